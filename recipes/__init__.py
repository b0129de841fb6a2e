"""Recipes: how the bundled models are made from nothing but Debian's speech engines."""

import rvc_mlx  # noqa: F401 (MLX reads the settings that it makes when it is imported)
