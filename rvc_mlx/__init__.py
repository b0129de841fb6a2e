"""RVC voice conversion in MLX."""
