"""RVC voice conversion in MLX.

Load a voice once, convert as often as needed::

    converter = rvc_mlx.load("voice.pth")
    result = converter.convert(audio, 44100, rvc_mlx.ConversionOptions(pitch=12))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rvc_mlx.machine import lend_openblas, set_up_cuda
from rvc_mlx.options import ConversionOptions
from rvc_mlx.version import __version__

if TYPE_CHECKING:
    from rvc_mlx.pipeline import Conversion, VoiceConverter, load

__all__ = ["Conversion", "ConversionOptions", "VoiceConverter", "__version__", "load"]


set_up_cuda()
lend_openblas()


def __getattr__(name: str) -> Any:
    """Import the pipeline only when it is used, so that ``--help`` is quick."""
    if name in {"Conversion", "VoiceConverter", "load"}:
        from rvc_mlx import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'rvc_mlx' has no attribute {name!r}")
