"""File formats that weights come in, read without running anything from the file."""
