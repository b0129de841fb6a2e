"""What imports what: the package runs without PyTorch, and its layers keep their order."""

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rvc_mlx"
# A module imports only from those before it.
ORDER = [
    *(
        "version",
        "arrays",
        "compiling",
        "machine",
        "spool",
        "audio",
        "ffmpeg_decoders",
        "decoders",
    ),
    *("output_format", "audio_io", "loudness", "spectral", "device_mel"),
    *("formats", "checkpoint", "download", "bundled_models"),
    *(
        "models",
        "noise",
        "cuda_kernel",
        "elementwise",
        "fused_norm",
        "device_high_pass",
        "steady",
        "gru_kernel",
        "salience_kernel",
        "conv_kernel",
        "warpgroup",
        "step_kernel",
        "attention_kernel",
        "windows",
        "fused_waveform",
        "product_convs",
        "fused_joints",
        "fused_source",
        "image_conv",
        "plane_kernel",
        "fused_blocks",
        "normed_conv",
        "fused_encoder",
        "fused_prior",
        "fused_unet",
        "feature_index",
        "faiss_file",
        "retrieval",
        "device_index",
    ),
    *("openvino_graph", "openvino_fusions", "openvino_ops", "engine", "options"),
    *("pitch", "loading", "segments", "report", "decoding", "job"),
    *("schedule", "file_run", "pipeline"),
    *("batch", "export", "inspection", "bench", "training", "cli"),
]
# Imported in functions only, where they are wanted.
OPTIONAL = {
    *("openvino", "av", "rich", "huggingface_hub"),
    *("faiss", "tensorboardX", "resemblyzer"),
}
REQUIRED = {"mlx", "numpy", "scipy", "soundfile", "soxr", "safetensors"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path, *, everywhere):
    """Absolute names of what a file imports: at its top, or in functions too."""
    tree = ast.parse(path.read_text())
    package = ".".join(path.relative_to(ROOT).parent.parts)
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: import by the package's name"
            base = node.module or ""
            base = f"{package}.{base}".rstrip(".") if node.level else base
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules_after(code):
    """Names in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["rvc_mlx", "rvc_mlx.pipeline", "rvc_mlx.cli"])
def test_import_is_free_of_heavy_packages(module):
    heavy = {"torch", "openvino", "gradio", "transformers", "faiss", "av", "librosa"}
    found = modules_after(f"import {module}")
    assert module in found
    assert heavy.isdisjoint(found)
    if module != "rvc_mlx.pipeline":
        assert {"mlx", "numpy", "scipy"}.isdisjoint(found)


def test_names_of_the_package_are_lazy_but_there():
    import rvc_mlx

    assert all(getattr(rvc_mlx, name) is not None for name in rvc_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        _ = rvc_mlx.loud


def test_conversion_needs_no_torch(home, small_models):
    """A whole conversion, in an interpreter that cannot import it."""
    found = modules_after(f"""if True:
        import sys

        class Without:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "faiss", "transformers"):
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, Without())
        import numpy as np, rvc_mlx
        converter = rvc_mlx.load(
            {str(small_models.voice)!r}, {str(small_models.index)!r},
            encoder={str(small_models.encoder)!r}, rmvpe={str(small_models.rmvpe)!r},
            device="cpu", precision="f32",
        )
        audio = np.sin(np.arange(4000, dtype=np.float32) / 20)
        assert len(converter.convert(audio, 16000).audio) == 8000
    """)
    assert "torch" not in found
    assert "openvino" in found


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_sources_import_only_what_is_declared(path):
    tops = {name.split(".")[0] for name in imports(path, everywhere=True)}
    foreign = tops - set(sys.stdlib_module_names) - {"rvc_mlx"}
    assert foreign <= REQUIRED | OPTIONAL
    tops = {name.split(".")[0] for name in imports(path, everywhere=False)}
    if not path.name.startswith("openvino_"):  # these are imported by a function
        assert OPTIONAL.isdisjoint(tops)
    assert "pickle" not in tops


def layer(name):
    """Place in ``ORDER`` of a module of the package, None for others."""
    parts = name.split(".")
    if parts[0] != "rvc_mlx" or len(parts) < 2 or parts[1] not in ORDER:
        return None
    return ORDER.index(parts[1])


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_one_way(path):
    name = module_of(path)
    if name in ("rvc_mlx", "rvc_mlx.__main__"):
        return
    own = layer(name)
    assert own is not None, f"add {name} to ORDER"
    used = {layer(other) for other in imports(path, everywhere=False)} - {None}
    assert all(place <= own for place in used)


def test_models_know_nothing_of_the_rest():
    for path in (PACKAGE / "models").glob("*.py"):
        for name in imports(path, everywhere=True):
            if name.startswith("rvc_mlx"):
                assert name.startswith("rvc_mlx.models"), f"{path}: {name}"
            else:
                top = name.split(".")[0]
                assert top in {"mlx", "numpy"} | set(sys.stdlib_module_names)


def test_reference_is_not_used_by_the_package():
    for path in sources():
        names = imports(path, everywhere=True)
        assert not any(
            name.startswith(("rvc_reference", "tools", "tests")) for name in names
        )


# The wheel --------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in 3.11")
def test_wheel_holds_the_package_and_its_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert settings["build-system"]["build-backend"] == "hatchling.build"
    assert settings["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "packages": ["rvc_mlx"]
    }
    declared = {
        line.split(";")[0].split(">")[0].split("<")[0].strip()
        for line in settings["project"]["dependencies"]
    }
    assert declared == REQUIRED | {"huggingface_hub", "rich"}
    extras = settings["project"]["optional-dependencies"]
    for name in ("cpu", "cuda", "av", "faiss"):
        assert not any("torch" in line for line in extras[name])


def test_bundled_data_is_not_ignored():
    """Hatch leaves out of a wheel what git ignores."""
    files = [path for path in (PACKAGE / "bundled").rglob("*") if path.is_file()]
    assert len(files) == 7
    patterns = (ROOT / ".gitignore").read_text().split()
    for file in files:
        relative = file.relative_to(ROOT)
        assert not any(
            relative.match(pattern) or pattern.strip("/") in relative.parts
            for pattern in patterns
        )


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="needs hatchling"
)
def test_built_wheel(tmp_path):
    code = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, check=True, capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in inside if ".dist-info/" not in name} == expected
    assert "rvc_mlx/py.typed" in inside
    models = {name for name in inside if name.startswith("rvc_mlx/bundled/")}
    assert {name.rsplit("/", 1)[1] for name in models} == {
        *("contentvec.safetensors", "rmvpe.safetensors", "speech.flac"),
        *("slt.safetensors", "slt.index", "rms.safetensors", "rms.index"),
    }
