"""Recipes: how the bundled models are made from nothing but Debian's speech engines."""
