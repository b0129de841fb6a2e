import collections
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rvc_mlx.checkpoint import hash_file, read_checkpoint, save_checkpoint

CLEAR = (ValueError, FileNotFoundError, IsADirectoryError)
LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path, value, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        array = tensors[name]
        tensor = tensor.detach()
        wanted = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert array.shape == tuple(tensor.shape), name
        assert array.dtype == wanted.numpy().dtype, name
        assert array.dtype.isnative
        assert array.flags.aligned
        np.testing.assert_array_equal(array, wanted.numpy(), strict=True)


def with_module(name, **classes):
    """A module that exists only while a file is written."""
    module = types.ModuleType(name)
    for key, value in classes.items():
        value.__module__ = name
        value.__qualname__ = key
        setattr(module, key, value)
    sys.modules[name] = module
    return module


@pytest.fixture
def voice():
    base = torch.arange(24, dtype=torch.float32)
    weight = collections.OrderedDict(
        half=torch.randn(2, 3).half(),
        parameter=torch.nn.Parameter(torch.randn(4)),
        transposed=base.view(4, 6).t(),
        offset=base[7:],
        strided=base[1::5],
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        expanded=torch.ones(1).expand(3),
    )
    return {
        "weight": weight,
        "config": [1025, 32, [3, 7], "1", 40000],
        "sr": "40k",
        "f0": 1,
        "version": "v2",
        "info": "200epoch",
    }


@LAYOUTS
def test_a_voice_comes_back_with_its_metadata(tmp_path, voice, zipped):
    got = read_checkpoint(save(tmp_path / "voice.pth", voice, zipped))
    assert_same(got.tensors, voice.pop("weight"))
    assert got.metadata == voice
    assert got.container == "weight"
    assert got.foreign == ()


@LAYOUTS
@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "float32",
        "float64",
        "bfloat16",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ],
)
def test_every_type_is_exact(tmp_path, dtype, zipped):
    raw = torch.randint(0, 256, (8, 6, 8), dtype=torch.uint8)
    kind = getattr(torch, dtype)
    tensor = raw > 127 if dtype == "bool" else raw.view(kind)
    if kind.is_floating_point:
        tensor = torch.nan_to_num(tensor)
    state = {"all": tensor, "last": tensor[-1], "turned": tensor.permute(2, 0, 1)}
    assert_same(read_checkpoint(save(tmp_path / "x.pt", state, zipped)).tensors, state)


def test_bfloat16_keeps_infinities_and_tiny_values(tmp_path):
    values = torch.tensor([float("inf"), -float("inf"), 1e-40, -0.0, 3.3e38])
    state = {"x": values.bfloat16()}
    assert_same(read_checkpoint(save(tmp_path / "x.pt", state)).tensors, state)
    assert np.isnan(
        read_checkpoint(
            save(tmp_path / "n.pt", {"x": torch.tensor([float("nan")]).bfloat16()})
        ).tensors["x"][0]
    )


@LAYOUTS
def test_shared_storages_are_shared(tmp_path, zipped):
    base = torch.randn(1000)
    state = {"a": base, "b": base[10:20], "c": base.view(10, 100).t()}
    got = read_checkpoint(save(tmp_path / "x.pt", state, zipped))
    assert_same(got.tensors, state)
    assert np.shares_memory(got.tensors["a"], got.tensors["b"])
    assert np.shares_memory(got.tensors["a"], got.tensors["c"])


@LAYOUTS
def test_arrays_cannot_be_written_to(tmp_path, zipped):
    state = {"a": torch.ones(3), "b": torch.ones(3).bfloat16(), "c": torch.ones(3) > 0}
    for array in read_checkpoint(
        save(tmp_path / "x.pt", state, zipped)
    ).tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def base_of(array):
    while getattr(array, "base", None) is not None and not isinstance(array, np.memmap):
        array = array.base
        array = array.obj if isinstance(array, memoryview) else array
    return array


def test_zip_and_safetensors_arrays_are_views_of_the_mapped_file(tmp_path):
    save(tmp_path / "x.pth", {"a": torch.ones(1000)})
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1000, np.float32)}, {})
    for name in ("x.pth", "x.safetensors"):
        array = read_checkpoint(tmp_path / name).tensors["a"]
        assert isinstance(base_of(array), np.memmap), name


@pytest.mark.parametrize("container", ["model", "state_dict", "bare"])
def test_containers(tmp_path, container):
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    value = state if container == "bare" else {container: state, "iteration": 7}
    got = read_checkpoint(save(tmp_path / "x.pt", value))
    assert got.container == container
    assert_same(got.tensors, state)
    assert got.metadata == ({} if container == "bare" else {"iteration": 7})


def test_optimizer_state_is_dropped_and_the_rest_of_a_training_file_kept(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": net.state_dict(),
        "iteration": 12,
        "optimizer": optimizer.state_dict(),
        "learning_rate": 1e-4,
        "scaler": {"scale": 65536.0},
        "running": {"mean": torch.zeros(3)},
    }
    got = read_checkpoint(save(tmp_path / "G_2333333.pth", value))
    assert_same(got.tensors, net.state_dict())
    assert got.metadata == {
        "iteration": 12,
        "learning_rate": 1e-4,
        "scaler": {"scale": 65536.0},
    }


@LAYOUTS
def test_values_that_are_almost_plain_become_plain(tmp_path, zipped):
    value = {
        "weight": {"a": torch.ones(1)},
        "rate": np.float32(0.5),
        "steps": np.int64(3),
        "name": np.str_("ä"),
        "flag": np.bool_(True),
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "type": torch.float16,
        "speakers": {0: "a", 1: "b"},
        "set": {4},
        "frozen": frozenset([5]),
        "tuple": (1, (2,)),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(x=None),
        "big": 2**64,
        "nothing": None,
        "array": np.arange(3),
        "raw": b"bytes",
    }
    got = read_checkpoint(save(tmp_path / "x.pth", value, zipped))
    assert got.metadata == {
        "rate": 0.5,
        "steps": 3,
        "name": "ä",
        "flag": True,
        "size": [1, 2],
        "device": "cuda:1",
        "type": "torch.float16",
        "speakers": {"0": "a", "1": "b"},
        "set": [4],
        "frozen": [5],
        "tuple": [1, [2]],
        "counter": {"a": 2, "b": 1},
        "ordered": {"x": None},
        "big": 2**64,
        "nothing": None,
    }


@LAYOUTS
def test_foreign_classes_are_left_aside(tmp_path, zipped):
    class Dictionary:
        def __init__(self):
            self.symbols, self.count, self.me = ["<s>", "</s>"], [1, 1], self

    class Config(dict):
        pass

    class Task:
        def __reduce__(self):
            return (Task, (), {"x": 1}, iter([1, 2]), iter([("a", 1)]))

        def append(self, _):
            pass

        def __setitem__(self, *_):
            pass

    with_module("fairseq_like", Dictionary=Dictionary, Config=Config, Task=Task)
    state = {
        "encoder.pos_conv.0.weight_g": torch.randn(1, 1, 4),
        "label": torch.ones(2),
    }
    value = {
        "args": None,
        "cfg": Config(task="x"),
        "model": state,
        "task_state": {"dictionaries": [Dictionary(), Dictionary()]},
        "extra_state": {"epoch": 3, "task": Task()},
        "optimizer_history": [{"num_updates": 400000}],
    }
    try:
        save(tmp_path / "hubert_base.pt", value, zipped)
    finally:
        del sys.modules["fairseq_like"]
    got = read_checkpoint(tmp_path / "hubert_base.pt")
    assert_same(got.tensors, state)
    assert got.container == "model"
    assert got.metadata == {
        "args": None,
        "optimizer_history": [{"num_updates": 400000}],
    }
    assert {f"fairseq_like.{n}" for n in ("Dictionary", "Config", "Task")} <= set(
        got.foreign
    )
    assert "fairseq_like" not in sys.modules


def test_tensors_of_foreign_classes_are_refused_by_name(tmp_path):
    class Fancy(torch.Tensor):
        pass

    with_module("fancy_like", Fancy=Fancy)
    try:
        save(
            tmp_path / "a.pth",
            {"weight": {"x": torch.ones(2).as_subclass(Fancy), "y": torch.ones(1)}},
        )
    finally:
        del sys.modules["fancy_like"]
    with pytest.raises(
        ValueError, match=r"x: this file needs the class fancy_like\.Fancy"
    ):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    ],
    ids=["complex", "sparse", "float8"],
)
@pytest.mark.parametrize("bare", [True, False])
def test_unknown_kinds_of_tensors_are_refused_by_name(tmp_path, tensor, name, bare):
    state = {"x": tensor, "y": torch.ones(1)}
    save(tmp_path / "a.pth", state if bare else {"weight": state})
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / "a.pth")


def test_a_whole_module_is_refused_by_name(tmp_path):
    save(tmp_path / "a.pth", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_weight_that_is_no_tensor_is_refused(tmp_path):
    save(tmp_path / "a.pth", {"weight": {"x": torch.ones(1), "y": [1]}})
    with pytest.raises(ValueError, match="'y' among the weights is a list"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_file_without_tensors_is_refused(tmp_path):
    save(tmp_path / "a.pth", {"generator": {"x": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"no tensors found.*'generator'"):
        read_checkpoint(tmp_path / "a.pth")


def big_endian_zip(path, order):
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(5, dtype=torch.int32)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/byteorder"):
                content = order
            if name.endswith("/data/0"):
                content = np.arange(5, dtype=">i4").tobytes()
            target.writestr(name, content)


def test_big_endian_files_are_read(tmp_path):
    big_endian_zip(tmp_path / "x.pth", b"big")
    array = read_checkpoint(tmp_path / "x.pth").tensors["x"]
    np.testing.assert_array_equal(array, np.arange(5, dtype=np.int32), strict=True)


def test_an_unknown_byte_order_is_refused(tmp_path):
    big_endian_zip(tmp_path / "x.pth", b"middle")
    with pytest.raises(ValueError, match="byte order"):
        read_checkpoint(tmp_path / "x.pth")


def test_views_in_the_older_layout(tmp_path):
    """PyTorch before 0.4 wrote (key, offset, size) for storages that are views."""
    key, view = "11", ("12", 2, 3)

    class Typed:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor, (Place(), 1, (2,), (1,)))

    class Place:
        pass

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            if isinstance(value, Place):
                return ("storage", torch.FloatStorage, key, "cpu", 6, view)
            return None

    with (tmp_path / "x.pt").open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, 2)
        Writer(file, 2).dump({"x": Typed()})
        pickle.dump([key], file, 2)
        file.write(struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes())
    got = read_checkpoint(tmp_path / "x.pt")
    np.testing.assert_array_equal(got.tensors["x"], np.array([3, 4], np.float32))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_numpy_arrays(tmp_path, protocol):
    arrays = {
        "c": np.random.default_rng(0).normal(size=(2, 3)),
        "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(300, dtype=">i4"),
        "empty": np.zeros((0, 3), np.int8),
        "zero": np.array(2.5, np.float16),
        "flags": np.array([True, False]),
        "long": np.arange(2000, dtype=np.uint8),
    }
    text = {"names": ["a"], "words": np.array(["a", "b"])}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({**arrays, **text}, protocol))
    got = read_checkpoint(tmp_path / "x.pkl")
    assert list(got.tensors) == list(arrays)
    for name, array in arrays.items():
        wanted = array.astype(array.dtype.newbyteorder("="))
        np.testing.assert_array_equal(got.tensors[name], wanted, strict=True)
        assert got.tensors[name].flags.aligned
    assert got.metadata == {"names": ["a"]}


def test_pickles_of_numpy_1_and_2_are_read(tmp_path):
    raw = pickle.dumps({"x": np.arange(3.0)}, 2)
    raw = raw.replace(b"numpy.core", b"numpy._core")
    assert b"numpy._core" in raw
    for name, content in {
        "new": raw,
        "old": raw.replace(b"numpy._core", b"numpy.core"),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(
            read_checkpoint(tmp_path / name).tensors["x"], [0, 1, 2]
        )


def sample(suffix):
    rng = np.random.default_rng(1)
    tensors = {
        name: (rng.normal(size=(3, 5)) * 50).astype(name)
        for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
    }
    tensors |= {
        name: np.arange(7, dtype=name) for name in ("uint8", "uint16", "uint32")
    }
    tensors |= {
        "u64": np.array([2**64 - 1], np.uint64),
        "file": np.array([True, False]),
        "zero": np.array(1.5),
        "empty": np.zeros((0, 2), np.float32),
        "turned": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "big": np.arange(3, dtype=">f4"),
    }
    metadata = {
        "config": [1, 2.5, [3], "x"],
        "sr": "40000",
        "f0": True,
        "none": None,
        "nested": {"a": {"b": [None, "ü\ud800", -0.0, 1e300, 2**70]}},
        "": "",
    }
    return tensors, metadata


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saved_files_come_back_the_same(tmp_path, suffix):
    tensors, metadata = sample(suffix)
    path = tmp_path / f"x{suffix}"
    save_checkpoint(path, tensors, metadata)
    got = read_checkpoint(path)
    assert got.metadata == metadata
    assert got.container == "bare"
    assert set(got.tensors) == set(tensors)
    for name, array in tensors.items():
        wanted = array.astype(array.dtype.newbyteorder("="))
        np.testing.assert_array_equal(got.tensors[name], wanted, strict=True)
        assert not got.tensors[name].flags.writeable
    assert os.listdir(tmp_path) == [path.name]


@LAYOUTS
def test_a_voice_survives_the_way_to_safetensors(tmp_path, voice, zipped):
    first = read_checkpoint(save(tmp_path / "voice.pth", voice, zipped))
    save_checkpoint(tmp_path / "voice.safetensors", first.tensors, first.metadata)
    second = read_checkpoint(tmp_path / "voice.safetensors")
    assert second.metadata == first.metadata
    assert set(second.tensors) == set(first.tensors)
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name], array, strict=True)


def test_other_readers_read_what_is_saved(tmp_path):
    tensors = {"a": np.arange(3.0), "b": np.array([True])}
    save_checkpoint(tmp_path / "x.safetensors", tensors, {"n": 1})
    save_checkpoint(tmp_path / "x.npz", tensors, {"n": 1})
    with np.load(tmp_path / "x.npz") as npz:
        assert json.loads(npz["__metadata__"].tobytes()) == {"n": 1}
        for loaded in (load_file(tmp_path / "x.safetensors"), npz):
            for name, array in tensors.items():
                np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_files_of_other_writers_are_read(tmp_path):
    tensors = {"a": np.arange(3, dtype=np.float32)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    np.savez(tmp_path / "x.npz", **tensors)
    got = read_checkpoint(tmp_path / "x.safetensors")
    assert got.metadata == {"format": "pt"}
    for path in ("x.safetensors", "x.npz"):
        np.testing.assert_array_equal(
            read_checkpoint(tmp_path / path).tensors["a"], [0, 1, 2]
        )


@pytest.mark.parametrize("metadata", [None, {"author": "me"}])
def test_safetensors_that_mlx_writes(tmp_path, metadata):
    path = tmp_path / "voice.safetensors"
    mx.save_safetensors(str(path), {"a": mx.arange(3)}, metadata)
    found = read_checkpoint(path)
    np.testing.assert_array_equal(found.tensors["a"], [0, 1, 2])
    assert found.metadata == (metadata or {})


def test_safetensors_of_the_size_of_an_encoder(tmp_path):
    half = np.resize(np.arange(2048, dtype=np.float16), 1 << 24)  # 32 MB
    tensors = {"a": half, "b": half[:4096], "c": half[:8192].reshape(2, -1)}
    save_file(tensors, tmp_path / "x.safetensors")
    got = read_checkpoint(tmp_path / "x.safetensors").tensors
    for name, value in tensors.items():
        assert np.array_equal(got[name], value, equal_nan=True)


def test_bfloat16_safetensors(tmp_path):
    from safetensors.torch import save_file as save_torch

    state = {"x": torch.randn(7).bfloat16(), "y": torch.ones(3)}
    save_torch(state, tmp_path / "x.safetensors")
    got = read_checkpoint(tmp_path / "x.safetensors").tensors
    assert_same(got, {name: state[name] for name in got})


def test_compressed_npz_says_what_to_do(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(100))
    with pytest.raises(ValueError, match=r"compressed; .*numpy\.savez"):
        read_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.pth", "x", "x.bin", "x.Safetensors.bak"])
def test_saving_under_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"saved as \.safetensors or \.npz"):
        save_checkpoint(tmp_path / name, {"a": np.ones(1)}, {})


@pytest.mark.parametrize(
    "metadata",
    [
        {"x": (1,)},
        {"x": {1: 2}},
        {"x": b""},
        {"x": [np.float32(1)]},
        {"x": np.ones(1)},
        {1: "x"},
        {"x": {"y": {2}}},
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata, suffix):
    with pytest.raises(ValueError, match="metadata"):
        save_checkpoint(tmp_path / f"x{suffix}", {"a": np.ones(1)}, metadata)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    "tensors",
    [
        {"a": np.ones(1, complex)},
        {"a": np.array(["x"])},
        {"a": np.array([None])},
        {"__metadata__": np.ones(1)},
    ],
)
def test_tensors_that_cannot_be_saved_are_refused(tmp_path, suffix, tensors):
    with pytest.raises(ValueError, match="tensor"):
        save_checkpoint(tmp_path / f"x{suffix}", tensors, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_failed_save_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    save_checkpoint(path, {"a": np.ones(1)}, {})
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"a": np.zeros(9)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        for suffix in (".safetensors", ".npz"):
            save_checkpoint(tmp_path / f"x{suffix}", {"a": np.ones(1)}, {})
            assert (tmp_path / f"x{suffix}").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_hash_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# Files that are something else


def test_a_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no\.pth: there is no such file; expected"
    ):
        read_checkpoint(tmp_path / "no.pth")


def test_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="this is a folder; expected"):
        read_checkpoint(tmp_path)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no regular file"):
        read_checkpoint(tmp_path / "x.pth")


def zip_bytes(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "audio"),
        (b"IwFl" + bytes(50), "retrieval index"),
        (b"IxF2" + bytes(50), "retrieval index"),
        (b"\x08\x07\x12\x07pytorch", "ONNX"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\x00", "single array"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"a/b".ljust(257, b"\0") + b"ustar\x0000" + bytes(250), "tar archive"),
        (b"plain text, nothing else", "no weights file"),
        (b"x", "no weights file"),
        (zip_bytes(), "not one data.pkl"),
        (zip_bytes(voice__model="hello"), "unpack it first"),
        (zip_bytes(a__data_pkl="x"), "not one data.pkl"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "x.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ")
    assert "\n" not in str(caught.value)


def test_torchscript_is_refused(tmp_path):
    files = {"a/data.pkl": b"\x80\x02}.", "a/code/x.py": b"", "a/constants.pkl": b""}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_suffix_that_says_otherwise_is_an_error(tmp_path):
    save(tmp_path / "torch", {"a": torch.ones(1)})
    save(tmp_path / "legacy", {"a": torch.ones(1)}, zipped=False)
    save_checkpoint(tmp_path / "a.safetensors", {"a": np.ones(1)}, {})
    save_checkpoint(tmp_path / "a.npz", {"a": np.ones(1)}, {})
    kinds = {
        "torch": ".pth",
        "legacy": ".pth",
        "a.safetensors": ".safetensors",
        "a.npz": ".npz",
    }
    for source, right in kinds.items():
        content = (tmp_path / source).read_bytes()
        for suffix in (".pth", ".safetensors", ".npz", ".backup"):
            path = tmp_path / f"b{suffix}"
            path.write_bytes(content)
            if suffix in (right, ".backup"):
                assert list(read_checkpoint(path).tensors) == ["a"]
            else:
                with pytest.raises(ValueError, match=f"rename it to b{right}"):
                    read_checkpoint(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors", "npz"])
def test_a_file_cut_anywhere_gives_a_clear_error(tmp_path, voice, kind):
    path = tmp_path / "whole"
    tensors = {"a": np.arange(40, dtype=np.float32), "b": np.ones((3, 3), np.float16)}
    if kind in ("zip", "legacy"):
        save(path, voice, kind == "zip")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(tensors, 4))
    else:
        save_checkpoint(tmp_path / f"x.{kind}", tensors, {"n": [1, 2]})
        path = tmp_path / f"x.{kind}"
    whole = path.read_bytes()
    cut = tmp_path / "cut"
    for length in sorted(
        {*range(min(len(whole), 400)), *range(0, len(whole), 37), len(whole) - 1}
    ):
        cut.write_bytes(whole[:length])
        with pytest.raises(CLEAR) as caught:
            read_checkpoint(cut)
        assert type(caught.value) in CLEAR
        assert str(caught.value).startswith(str(cut))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors", "npz"])
def test_a_damaged_byte_gives_a_result_or_a_clear_error(tmp_path, voice, kind):
    rng = np.random.default_rng(7)
    path = tmp_path / "whole"
    tensors = {"a": np.arange(4, dtype=np.float32)}
    if kind in ("zip", "legacy"):
        save(path, {"weight": {"a": torch.ones(4)}, "config": [1, "x"]}, kind == "zip")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(tensors, 2))
    else:
        path = tmp_path / f"x.{kind}"
        save_checkpoint(path, tensors, {"n": [1, 2]})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(600):
        bad = whole.copy()
        bad[rng.integers(len(bad), size=rng.integers(1, 4))] = rng.integers(256)
        (tmp_path / "bad").write_bytes(bad.tobytes())
        with contextlib.suppress(ValueError):
            read_checkpoint(tmp_path / "bad")


FULL_DISK = """
import resource, sys
import numpy as np
from rvc_mlx.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
try:
    save_checkpoint(sys.argv[1], {"a": np.zeros(1 << 20)}, {})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_a_full_disk_is_told_and_cleaned_up(tmp_path, name):
    command = [sys.executable, "-c", FULL_DISK, tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []
