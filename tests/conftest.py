"""What several test files share: the small models, a loaded converter, test voices."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rvc_mlx  # noqa: F401 (before any mlx, so that OpenBLAS serves it)

ROOT = Path(__file__).parents[1]
TEST_MODELS = ROOT / ".test-models"


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Weights and compiled models of the tests' own, never the user's."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVC_MLX_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """The same number of threads everywhere, so that sums round alike."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="module")
def _one_thread():
    """PyTorch on one thread: in small networks more of them mostly wait."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    """Global generators start every test alike."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    if mx := sys.modules.get("mlx.core"):
        mx.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def small_models() -> SimpleNamespace:
    """Paths of the tests' small models, and of a clip of speech to convert."""
    folder = ROOT / "tests" / "small_models"
    return SimpleNamespace(
        folder=folder,
        voice=folder / "voice.pth",
        index=folder / "voice.index",
        encoder=folder / "contentvec",
        rmvpe=folder / "rmvpe.pt",
        speech=folder / "speech.flac",
    )


@pytest.fixture(scope="session")
def speech(small_models) -> np.ndarray:
    """The clip of the small models, ``[n]`` float32 at 16 kHz; not to be changed."""
    from rvc_mlx.audio_io import load_audio

    audio = load_audio(small_models.speech)
    audio.flags.writeable = False
    return audio


@pytest.fixture(scope="session")
def small_converter(home, small_models):
    """The small models in float32 on the CPU."""
    from rvc_mlx import load

    return load(
        small_models.voice,
        small_models.index,
        encoder=small_models.encoder,
        rmvpe=small_models.rmvpe,
        device="cpu",
        precision="f32",
    )


@pytest.fixture(scope="session")
def test_models() -> Callable[[str], Path]:
    """Name to path of a full-size random model, made at its first use and kept.

    Names are those of ``tools/make_test_models.py``. Delete ``.test-models`` after a
    change there.
    """

    def path(name: str) -> Path:
        from tools.make_test_models import make_test_models

        for found in (TEST_MODELS / name, TEST_MODELS / f"{name}.pth"):
            if found.exists():
                return found
        making = TEST_MODELS / f".{name}.{os.getpid()}"
        try:
            [made] = make_test_models(making, [name]).values()
            made.rename(TEST_MODELS / made.name)
            return TEST_MODELS / made.name
        except OSError:
            if not (TEST_MODELS / made.name).exists():  # made by another process
                raise
            return TEST_MODELS / made.name
        finally:
            shutil.rmtree(making, ignore_errors=True)

    return path
