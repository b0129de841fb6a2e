"""Training of voices: data, networks, the run. ``commands`` is its command line.

Nothing is imported here: worker processes and ``rvc-mlx --help`` load this package.
"""
