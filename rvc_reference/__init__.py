"""PyTorch reference of RVC inference: the parity oracle and the speed opponent.

Development only, never in the wheel. Every network is plain eager PyTorch in
float32 with the key names of the public checkpoints, so that
``load_state_dict(strict=True)`` accepts them as they are. Nothing here is shared
with ``rvc_mlx``: a mistake in one of the two shows as a difference.

Public arrays are channels-last (``[B, T, C]``); channels-first is internal.
Randomness is always an argument (see ``noise.py``).
"""
