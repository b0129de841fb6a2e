"""The models that the package brings along, by name: two voices and what they need.

They are early demonstration weights, trained on synthetic speech; docs/MODELS.md lists
them with what they reach::

    bundled/
    ├── contentvec.safetensors    the content encoder and the pitch network,
    ├── rmvpe.safetensors         which the voices call ``rvc-mlx-small``
    ├── slt.safetensors           a voice, and its index
    ├── slt.index
    └── speech.flac               a clip to convert, by a speaker that no training hears
"""

from __future__ import annotations

import logging
from pathlib import Path

FOLDER = Path(__file__).with_name("bundled")
SPEECH = FOLDER / "speech.flac"
NETWORKS = "rvc-mlx-small"  # in a voice's metadata, for encoder and pitch network
VOICES = ("slt", "rms")
DEMO_VOICE = "slt"

_LOG = logging.getLogger("rvc_mlx")


def bundled_network(kind: str) -> Path:
    """The file of ``"contentvec"`` or ``"rmvpe"``."""
    return FOLDER / f"{kind}.safetensors"


def bundled_voice(name: str) -> Path:
    """The file of one of ``VOICES``."""
    return FOLDER / f"{name}.safetensors"


def bundled_index(name: str) -> Path:
    """The index of one of ``VOICES``."""
    return FOLDER / f"{name}.index"


def word_errors(name: str) -> dict[str, float]:
    """Words that a recogniser got wrong when one of ``VOICES`` was judged, in %.

    Returns:
        ``"source"`` and ``"output"``, of strangers' clips, as the voice's file tells it.
    """
    from rvc_mlx.checkpoint import read_checkpoint

    judged = read_checkpoint(bundled_voice(name)).metadata["metrics"]["natural"]
    return {
        side: judged["words"][f"word_error_{side}"] for side in ("source", "output")
    }


def choose_voice(
    voice: str | Path, index: str | Path | None = None
) -> tuple[Path, Path | None]:
    """The files of a voice that is given by name or as a file.

    A file goes before a bundled voice of the same name, and a line in the log tells
    that there are both. The bundled voices have heard strangers' features in training and
    are understood better without their indexes, so these must be asked for.

    Args:
        voice: a file, or one of ``VOICES``.
        index: its index: a file, or one of ``VOICES`` for the bundled voice's; None or ""
            for none.

    Returns:
        The voice's file, and its index or None.

    Raises:
        FileNotFoundError: there is neither a file nor a bundled voice of that name.
    """
    path, name = Path(voice), str(voice)
    given = Path(index) if index else None
    if str(index) in VOICES and not Path(str(index)).is_file():
        given = bundled_index(str(index))
    if name not in VOICES:
        if not path.exists():
            raise FileNotFoundError(
                f"{voice}: there is no such file; expected a voice (.pth, .safetensors "
                f"or .npz), or the name of a bundled one: {', '.join(VOICES)}"
            )
        return path, given
    if path.is_file():
        _LOG.warning(
            "%s: the file of this name that is here is meant, not the bundled voice; "
            "rename the file to get that one",
            name,
        )
        return path, given
    if path.exists():
        _LOG.warning(
            "%s: the bundled voice is meant, not the folder of this name that is here; "
            "name the file in it to get that one",
            name,
        )
    return bundled_voice(name), given
