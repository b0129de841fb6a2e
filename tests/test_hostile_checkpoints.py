"""Files that try to run code, to read what is not theirs, or to use up the machine.

Each payload would create a sentinel file. It must not exist afterwards; the file must
be refused with a clear error, or be read with the payload left aside.
"""

import contextlib
import functools
import io
import json
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from rvc_mlx.checkpoint import read_checkpoint
from rvc_mlx.formats.pickle_stack import MAX_OPCODES

PEAK_LIMIT = 64 * 2**20  # bytes
TIME_LIMIT = 20.0  # seconds, with memory tracing on a busy machine

# A small assembler: each function gives the opcodes that leave one value on the stack.


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def short(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def data(raw):
    return b"B" + struct.pack("<I", len(raw)) + raw


def number(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*items):
    return b"(" + b"".join(items) + b"t"


def mapping(**items):
    pairs = b"".join(text(key) + value for key, value in items.items())
    return b"}(" + pairs + b"u"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module, attribute):
    return short(module) + short(attribute) + b"\x93"


def call(function, *arguments):
    return function + group(*arguments) + b"R"


ORDERED_DICT = call(name("collections", "OrderedDict"))
STORAGE = name("torch", "FloatStorage")


def persistent(key="0", count=4, kind=STORAGE, word="storage"):
    number_ops = number(count) if isinstance(count, int) else count
    key_ops = text(key) if isinstance(key, str) else key
    return group(text(word), kind, key_ops, text("cpu"), number_ops) + b"Q"


def tensor(storage=None, offset=0, size=(4,), stride=(1,)):
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        persistent() if storage is None else storage,
        number(offset),
        group(*map(number, size)),
        group(*map(number, stride)),
        b"\x89",
        ORDERED_DICT,
    )


def program(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + b"."


def array():
    return pickle.dumps(np.arange(4, dtype=np.float32), 2)[2:-1]


def write_zip(path, pickled, entries=None):
    files = {"a/data.pkl": pickled, "a/data/0": bytes(16)} | (entries or {})
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in files.items():
            archive.writestr(entry, content)
    return path


def write(path, zipped, protocol=4, **items):
    """A checkpoint with good weights and the given items, in either layout."""
    good = tensor() if zipped else array()
    pickled = program(mapping(weight=mapping(good=good), **items), protocol)
    if zipped:
        return write_zip(path, pickled)
    path.write_bytes(pickled)
    return path


@pytest.fixture
def bounded():
    """Fails a test that takes long or much memory."""
    tracemalloc.start()
    begin = time.perf_counter()
    yield
    duration = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAK_LIMIT
    assert duration < TIME_LIMIT


def payloads(sentinel):
    """Name to opcodes; every one would create ``sentinel`` in a trusting reader."""
    shell = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    command = text(shell)
    system = call(name("os", "system"), command)
    list_class = name("builtins", "list")
    nested = pickle.dumps({"x": 1})
    run_exec = program(call(name("builtins", "exec"), text(code)))
    object_array = (
        call(
            name("numpy._core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            group(number(0)),
            b"C\x01b",
        )
        + group(
            number(1),
            group(number(1)),
            call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
            b"\x89",
            b"](" + system + b"e",
        )
        + b"b"
    )
    return {
        "os.system by REDUCE": system,
        "posix.system by REDUCE": call(name("posix", "system"), command),
        "nt.system by REDUCE": call(name("nt", "system"), command),
        "os.system by INST": b"(" + command + b"ios\nsystem\n",
        "os.system by OBJ": b"(" + name("os", "system") + command + b"o",
        "os.system by NEWOBJ": name("os", "system") + group(command) + b"\x81",
        "os.system by NEWOBJ_EX": name("os", "system") + group(command) + b"}\x92",
        "os.system by STACK_GLOBAL": call(stack_name("os", "system"), command),
        "dotted name by STACK_GLOBAL": call(
            stack_name("os", "path.os.system"), command
        ),
        "dotted name by GLOBAL": call(name("os", "path.os.system"), command),
        "dotted name on the allow-list": call(
            stack_name("collections", "OrderedDict.__init__.__globals__"), command
        ),
        "dotted name in torch": call(stack_name("torch", "Size.__class__"), command),
        "memoised function": name("os", "system")
        + b"q\x050h\x05"
        + group(command)
        + b"R",
        "builtins.eval": call(name("builtins", "eval"), text(code)),
        "builtins.exec": call(name("builtins", "exec"), text(code)),
        "__builtin__.exec": call(name("__builtin__", "exec"), text(code)),
        "builtins.compile": call(
            name("builtins", "compile"), text(code), text("x"), text("exec")
        ),
        "builtins.open": call(name("builtins", "open"), text(str(sentinel)), text("w")),
        "builtins.__import__": call(
            name("builtins", "__import__"), text("antigravity")
        ),
        "getattr to system": call(
            call(name("builtins", "getattr"), name("os", "path"), text("os")), command
        ),
        "getattr of a good class": call(
            call(name("builtins", "getattr"), name("torch", "Size"), text("__base__")),
            command,
        ),
        "subprocess.Popen": call(
            name("subprocess", "Popen"),
            b"](" + text("touch") + text(str(sentinel)) + b"e",
        ),
        "subprocess.run by NEWOBJ_EX": name("subprocess", "run")
        + group(command)
        + mapping(shell=b"\x88")
        + b"\x92",
        "BUILD with __setstate__": name("collections", "OrderedDict")
        + b")R"
        + mapping(__setstate__=name("os", "system"))
        + b"b"
        + command
        + b"b",
        "BUILD with __dict__ of an allowed name": name("torch", "Size")
        + mapping(build=name("os", "system"))
        + b"b",
        "BUILD with slots": name("torch._utils", "_rebuild_tensor_v2")
        + group(b"N", mapping(name=text("x"), build=name("os", "system")))
        + b"b",
        "BUILD on a foreign class": name("http.server", "HTTPServer")
        + mapping(__class__=name("os", "system"), __reduce__=name("os", "system"))
        + b"b",
        "BUILD on a storage type": STORAGE + mapping(dtype=name("os", "system")) + b"b",
        "SETITEMS on a foreign object": name("os", "environ")
        + text("PATH")
        + text(str(sentinel))
        + b"s",
        "APPENDS to a foreign object": name("sys", "path")
        + b"("
        + text(str(sentinel))
        + b"e",
        "numpy object array": object_array,
        "numpy.load": call(name("numpy", "load"), text(str(sentinel)), b"N", b"\x88"),
        "numpy runstring": call(
            name("numpy.testing._private.utils", "runstring"), text(code), b"}"
        ),
        "numpy f2py compile": call(name("numpy.f2py", "compile"), text(code)),
        "numpy dtype of a class": call(name("numpy", "dtype"), name("os", "system")),
        "numpy scalar of objects": call(
            name("numpy.core.multiarray", "scalar"),
            call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
            data(run_exec),
        ),
        "numpy memmap": call(
            name("numpy", "memmap"), text(str(sentinel)), text("u1"), text("w+")
        ),
        "numpy fromfile by _reconstruct": call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("os", "system"),
            group(command),
            text("b"),
        ),
        "torch.load": call(name("torch", "load"), text(str(sentinel))),
        "torch.storage._load_from_bytes": call(
            name("torch.storage", "_load_from_bytes"), data(run_exec)
        ),
        "torch.utils hook": call(
            name("torch.utils._config_module", "load_config"), data(run_exec)
        ),
        "torch.jit": call(
            name("torch.jit.unsupported_tensor_ops", "execWrapper"), text(code)
        ),
        "torch._inductor": call(
            name("torch._inductor.codecache", "PyCodeCache.load"), text(code)
        ),
        "torch._rebuild_wrapper_subclass": call(
            name("torch._utils", "_rebuild_wrapper_subclass"),
            name("os", "system"),
            command,
        ),
        "_rebuild_from_type_v2": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("os", "system"),
            name("torch", "Tensor"),
            group(command),
            b"N",
        ),
        "_rebuild_from_type_v2 with a foreign class": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch._utils", "_rebuild_tensor_v2"),
            name("os", "system"),
            group(command),
            b"N",
        ),
        "_rebuild_from_type_v2 with another builder": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch", "Size"),
            name("torch", "Tensor"),
            group(command),
            b"N",
        ),
        "_rebuild_parameter of code": call(
            name("torch._utils", "_rebuild_parameter"), system, b"\x88", ORDERED_DICT
        ),
        "pickle.loads": call(name("pickle", "loads"), data(run_exec)),
        "_pickle.loads": call(name("_pickle", "loads"), data(nested)),
        "joblib.load": call(name("joblib", "load"), text(str(sentinel))),
        "functools.partial": call(
            call(name("functools", "partial"), name("os", "system"), command)
        ),
        "functools.reduce": call(
            name("functools", "reduce"),
            name("builtins", "exec"),
            b"](" + text(code) + b"}e",
        ),
        "operator.attrgetter": call(
            call(
                call(name("operator", "attrgetter"), text("system")),
                call(name("importlib", "import_module"), text("os")),
            ),
            command,
        ),
        "operator.methodcaller": call(
            call(name("operator", "methodcaller"), text("system"), command),
            name("os", "path"),
        ),
        "importlib.import_module": call(
            name("importlib", "import_module"), text("antigravity")
        ),
        "runpy": call(name("runpy", "run_path"), text(str(sentinel))),
        "webbrowser.open": call(name("webbrowser", "open"), text("file:///etc/passwd")),
        "socket.create_connection": call(
            name("socket", "create_connection"), group(text("127.0.0.1"), number(9))
        ),
        "urllib": call(
            name("urllib.request", "urlretrieve"), text("file:///etc/passwd"), command
        ),
        "shutil.copy": call(
            name("shutil", "copy"), text("/etc/passwd"), text(str(sentinel))
        ),
        "pathlib touch": call(
            call(
                name("builtins", "getattr"),
                call(name("pathlib", "Path"), text(str(sentinel))),
                text("touch"),
            )
        ),
        "pty.spawn": call(name("pty", "spawn"), b"](" + command + b"e"),
        "timeit": call(name("timeit", "timeit"), text(code)),
        "code.interact": call(name("code", "InteractiveInterpreter"), b"}"),
        "ctypes": call(name("ctypes", "CDLL"), text(str(sentinel))),
        "types.CodeType": call(name("types", "CodeType"), data(code.encode())),
        "marshal.loads": call(name("marshal", "loads"), data(b"\xe3")),
        "logging.config": call(
            name("logging.config", "dictConfig"), mapping(version=number(1))
        ),
        "copyreg.__reduce_ex__": call(
            name("copyreg", "__reduce_ex__"), name("os", "system"), number(2)
        ),
        "copyreg._reconstructor": call(
            name("copyreg", "_reconstructor"), name("os", "system"), list_class, b"N"
        ),
        "copyreg.__newobj_ex__": call(
            name("copyreg", "__newobj_ex__"), name("os", "system"), group(command), b"}"
        ),
        "copyreg.add_extension": call(
            name("copyreg", "add_extension"), text("os"), text("system"), number(7)
        ),
        "defaultdict with a factory": call(
            name("collections", "defaultdict"), name("os", "system")
        )
        + command
        + b"N"
        + b"s",
        "Counter of a function": call(
            name("collections", "Counter"), name("os", "system")
        ),
        "_codecs.encode with hex": call(
            name("_codecs", "encode"), command, text("hex_codec")
        ),
        "_codecs.encode with rot13": call(
            name("_codecs", "encode"), command, text("rot13")
        ),
        "_codecs.encode with errors": call(
            name("_codecs", "encode"), text("\u20ac"), text("latin1"), text("os.system")
        ),
        "_codecs.encode of what is not latin1": call(
            name("_codecs", "encode"), text("\u20ac"), text("latin1")
        ),
        "_codecs.decode": call(
            name("_codecs", "decode"), data(b"00"), text("zip_codec")
        ),
        "codecs.register_error": call(
            name("_codecs", "register_error"), text("x"), name("os", "system")
        ),
        "bytearray of code": call(name("builtins", "bytearray"), system, text("utf-8")),
        "extension registry 1": b"\x82\x07",
        "extension registry 2": b"\x83\x07\x00",
        "extension registry 4": b"\x84\x07\x00\x00\x00",
        "buffer outside the file": b"\x97",
        "read-only buffer": data(b"x") + b"\x98",
        "text persistent id": f"P{shell}\n".encode(),
        "text integer": b"I1\n",
        "text string": f"S'{shell}'\n".encode(),
        "unknown opcode": b"\xff",
        "name that is no text": number(1) + number(2) + b"\x93",
        "name that is a foreign class": name("os", "x") + name("os", "y") + b"\x93",
        "call of a string": text("os.system") + group(command) + b"R",
        "call of a dict": b"}" + group(command) + b"R",
        "call of a number": number(1) + group(command) + b"R",
        "call without a tuple": name("torch", "Size") + command + b"R",
        "foreign class as a key": b"}" + system + command + b"s",
        "dict as a key": b"}}" + command + b"s",
        "system in a storage id": group(
            text("storage"), system, text("0"), text("cpu"), number(4)
        )
        + b"Q",
        "system as a storage key": persistent(key=system),
        "system as a storage size": persistent(count=system),
        "persistent id of another kind": persistent(word="module"),
        "persistent id that is text": command + b"Q",
        "tensor of a foreign storage": tensor(system),
    }


NAMES = sorted(payloads("x"))


def test_the_suite_is_large():
    assert len(NAMES) >= 30
    assert len(set(payloads("x").values())) == len(NAMES)


def assert_harmless(path, sentinel):
    """The file is refused, or gives its good weights and nothing else."""
    try:
        got = read_checkpoint(path)
    except ValueError as error:
        message = str(error)
    else:
        assert list(got.tensors) == ["good"]
        assert got.tensors["good"].shape == (4,)
        json.dumps(got.metadata)  # plain data only
        message = str(path)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "payload",
    [
        "os.system by REDUCE",
        "os.system by INST",
        "os.system by OBJ",
        "os.system by STACK_GLOBAL",
        "dotted name by STACK_GLOBAL",
        "memoised function",
        "builtins.eval",
        "builtins.exec",
        "functools.reduce",
        "numpy object array",
        "numpy runstring",
        "pickle.loads",
    ],
)
def test_payloads_do_run_in_a_reader_that_trusts_them(tmp_path, payload):
    sentinel = tmp_path / "sentinel"
    with contextlib.suppress(TypeError):
        pickle.loads(program(payloads(sentinel)[payload], 4))
    assert sentinel.exists()


WATCHED = {"import", "exec", "compile", "os.system", "subprocess.Popen", "os.exec"}
watching: list[list] = []


def test_nothing_is_imported_compiled_or_run(tmp_path):
    def hook(event, arguments):
        if watching and (event in WATCHED or event.startswith(("socket.", "os.spawn"))):
            watching[0].append((event, arguments))

    sys.addaudithook(hook)
    seen = []
    for turn, (payload, body) in enumerate(payloads(tmp_path / "sentinel").items()):
        path = write(tmp_path / "x.pth", True, evil=body)
        if turn > 0:  # the first read may import parts of numpy
            watching.append(seen)
        try:
            assert_harmless(path, tmp_path / "sentinel")
        finally:
            watching.clear()
        assert not seen, payload


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("payload", NAMES)
def test_payload_beside_the_weights(tmp_path, payload, zipped):
    sentinel = tmp_path / "sentinel"
    body = payloads(sentinel)[payload]
    assert_harmless(write(tmp_path / "x.pth", zipped, evil=body), sentinel)


@pytest.mark.parametrize("payload", NAMES)
def test_payload_as_a_weight_or_as_the_whole_file(tmp_path, payload):
    sentinel = tmp_path / "sentinel"
    body = payloads(sentinel)[payload]
    weight = program(mapping(weight=mapping(good=tensor(), evil=body)), 4)
    for pickled in (weight, program(body, 4), program(mapping(weight=body), 4)):
        write_zip(tmp_path / "x.pth", pickled)
        with pytest.raises(ValueError, match=r"x\.pth: "):
            read_checkpoint(tmp_path / "x.pth")
        assert not sentinel.exists()


@pytest.mark.parametrize("payload", NAMES)
def test_payload_in_the_older_layout(tmp_path, payload):
    sentinel = tmp_path / "sentinel"
    body = payloads(sentinel)[payload]
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    good = program(mapping(weight=mapping(good=array())), 2)
    for place in range(4):
        stream = [*parts, pickle.dumps({}, 2), good, pickle.dumps([], 2)]
        stream[min(place, 1) if place < 2 else place] = program(body, 4)
        (tmp_path / "x.pth").write_bytes(b"".join(stream))
        assert_harmless(tmp_path / "x.pth", sentinel)


# Storages and tensors that point elsewhere


def read_tensor(tmp_path, body, entries=None):
    pickled = program(mapping(weight=mapping(good=body)))
    return read_checkpoint(write_zip(tmp_path / "x.pth", pickled, entries))


def test_the_assembled_tensor_is_good_to_begin_with(tmp_path):
    assert read_tensor(tmp_path, tensor()).tensors["good"].shape == (4,)


@pytest.mark.parametrize(
    "storage",
    [
        persistent(count=2**62),
        persistent(count=2**400),
        persistent(count=5),
        persistent(count=3),
        persistent(count=-4),
        persistent(count=b"\x88"),
        persistent(count=b"N"),
        persistent(count=b"G" + struct.pack(">d", 4.0)),
        persistent(key="1"),
        persistent(key=""),
        persistent(key="../../../../etc/passwd"),
        persistent(key="/etc/passwd"),
        persistent(key="../data.pkl"),
        persistent(key="0\0"),
        persistent(key=number(0)),
        persistent(kind=text("FloatStorage")),
        persistent(kind=b"N"),
        persistent(kind=name("torch", "DoubleStorage")),
        group(text("storage")) + b"Q",
        group() + b"Q",
        b"NQ",
        number(0),
        b"N",
    ],
)
def test_forged_storages_are_refused(tmp_path, storage, bounded):
    with pytest.raises(ValueError, match=r"x\.pth: "):
        read_tensor(tmp_path, tensor(storage))


@pytest.mark.parametrize(
    "forged",
    [
        {"size": (5,)},
        {"size": (2, 4), "stride": (1, 1)},
        {"size": (2,), "stride": (4,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**80},
        {"size": (-1,)},
        {"size": (2,), "stride": (-1,)},
        {"size": (2**63,), "stride": (0,)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (10**9,), "stride": (0,)},
        {"size": (2**32, 2**32), "stride": (0, 0)},
        {"size": (0, 2**62, 2**62), "stride": (1, 1, 1)},
        {"size": (2,), "stride": (2**63,)},
        {"size": (2,), "stride": (2**64 - 1,)},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"size": (1,) * 33, "stride": (1,) * 33},
        {"size": (4,), "stride": (1, 1)},
        {"size": (0,), "offset": 5},
    ],
    ids=str,
)
def test_tensors_outside_their_storage_are_refused(tmp_path, forged, bounded):
    with pytest.raises(ValueError, match=r"x\.pth: "):
        read_tensor(tmp_path, tensor(**forged))


def test_many_views_that_unpack_to_much_are_refused(tmp_path, bounded):
    body = b"".join(
        text(f"t{i}") + tensor(size=(10**5,), stride=(0,)) for i in range(500)
    )
    pickled = program(mapping(weight=b"}(" + body + b"u"))
    write_zip(tmp_path / "x.pth", pickled)
    with pytest.raises(ValueError, match="unpack to"):
        read_checkpoint(tmp_path / "x.pth")


def typed(kind, count, dtype):
    return call(
        name("torch._utils", "_rebuild_tensor_v3"),
        persistent(count=count, kind=name("torch.storage", kind)),
        number(0),
        group(number(1)),
        group(number(1)),
        b"\x89",
        ORDERED_DICT,
        name("torch", dtype),
    )


def test_one_storage_read_as_many_types_is_refused(tmp_path, bounded):
    types = [f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)]
    types += ["float16", "float32", "float64", "bfloat16", "bool"]
    size = 2**20
    pairs = b"".join(text(t) + typed("UntypedStorage", size, t) for t in types)
    pickled = program(mapping(weight=b"}(" + pairs + b"u"))
    entries = {"a/data/0": bytes(size), "a/byteorder": b"big"}
    write_zip(tmp_path / "x.pth", pickled, entries)
    with pytest.raises(ValueError, match="as many types"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("shape", "code", "raw"),
    [
        ((4,), "f4", bytes(15)),
        ((2**62,), "f4", bytes(16)),
        ((2**62, 4), "f4", bytes(16)),
        ((-4,), "f4", bytes(16)),
        ((4,), "O8", bytes(32)),
        ((4,), "V4", bytes(16)),
        ((4,), "M8", bytes(32)),
        ((1,), "U9999999", bytes(16)),
        ((1,) * 70, "f4", bytes(4)),
    ],
)
@pytest.mark.parametrize("function", ["BUILD", "_frombuffer"])
def test_forged_numpy_arrays_are_refused(tmp_path, shape, code, raw, function, bounded):
    dtype = call(name("numpy", "dtype"), text(code), b"\x89", b"\x88")
    size = group(*map(number, shape))
    if function == "BUILD":
        body = call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            group(number(0)),
            text("b"),
        )
        body += group(number(1), size, dtype, b"\x89", data(raw)) + b"b"
    else:
        body = call(
            name("numpy._core.numeric", "_frombuffer"),
            data(raw),
            dtype,
            size,
            text("C"),
        )
    (tmp_path / "x.pkl").write_bytes(program(mapping(weight=mapping(x=body))))
    with pytest.raises(ValueError, match=r"x\.pkl: "):
        read_checkpoint(tmp_path / "x.pkl")


# Bombs


def nest(opening, closing, depth=10**5):
    return opening * depth + b"N" + closing * depth


def laughs(levels, combine):
    """A value whose written-out size is 10 to the power of ``levels``."""
    body = text("lol") + b"q\x00"
    for level in range(levels):
        body += b"0" + combine(b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return body


@functools.cache
def bombs():
    shared = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\x00"
    encode = name("_codecs", "encode")
    return {
        "LONG4 of 2 GiB": b"\x8b\xff\xff\xff\x7f",
        "LONG4 of negative length": b"\x8b\xff\xff\xff\xff",
        "LONG4 of 16 MiB": b"\x8b\x00\x00\x00\x01" + b"\x7f" * 2**24,
        "LONG1 of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
        "BINBYTES8 of 2^60 bytes": b"\x8e" + struct.pack("<Q", 2**60),
        "BINBYTES8 of 2^64-1 bytes": b"\x8e" + b"\xff" * 8,
        "BINUNICODE8 of 2^60 bytes": b"\x8d" + struct.pack("<Q", 2**60),
        "BYTEARRAY8 of 2^60 bytes": b"\x96" + struct.pack("<Q", 2**60),
        "BINBYTES of 4 GiB": b"B\xff\xff\xff\xff",
        "BINSTRING of negative length": b"T\xff\xff\xff\xff",
        "FRAME of 2^60 bytes": b"\x95" + struct.pack("<Q", 2**60),
        "memo index of 2^32": b"Nr\xff\xff\xff\xff",
        "memo index never set": b"j\xff\xff\xff\xff",
        "many memo entries": b"]\x94" * (MAX_OPCODES // 2),
        "many memo indices": b"N" + b"".join(
            b"r" + struct.pack("<I", i * 4096) for i in range(MAX_OPCODES - 100)
        ),
        "many opcodes": b"N0" * (MAX_OPCODES * 4) + b"N",
        "many marks": b"(" * (MAX_OPCODES * 4),
        "many lists": b"(" + b"]" * (MAX_OPCODES - 100) + b"t",
        "many dicts": b"(" + b"}" * (MAX_OPCODES - 100) + b"t",
        "many filled dicts": b"(" + b"}NNs" * (MAX_OPCODES // 4 - 100) + b"t",
        "many filled lists": b"(" + b"]Na" * (MAX_OPCODES // 3 - 100) + b"t",
        "many sets": b"(" + b"\x8f" * (MAX_OPCODES - 100) + b"t",
        "many classes": b"".join(name("m", f"c{i}") + b"0" for i in range(10**5)) + b"N",
        "overlong class name": name("m", "c" * 10**6),
        "overlong class name on the stack": text("m" * 10**6) + text("c") + b"\x93",
        "nested lists": nest(b"](", b"e"),
        "nested lists by APPEND": nest(b"]", b"a"),
        "nested tuples": nest(b"(", b"t"),
        "nested tuples by TUPLE1": nest(b"", b"\x85"),
        "nested dicts": nest(b"}" + text("k"), b"s", 5 * 10**4),
        "nested tuple as a key": b"}" + nest(b"", b"\x85") + b"Ns",
        "nested tuple as a set member": b"\x8f(" + nest(b"", b"\x85") + b"\x90",
        "nested frozensets": nest(b"(", b"\x91"),
        "laughing tuple as a key": b"})" + b"q\x00h\x00\x86" * 80 + b"Ns",
        "laughing list": laughs(100, lambda x: b"](" + x * 10 + b"e"),
        "laughing dict": laughs(
            100,
            lambda x: b"}(" + b"".join(text(f"{i}") + x for i in range(10)) + b"u",
        ),
        "list in itself": b"]q\x00h\x00a",
        "dict in itself": b"}q\x00" + text("x") + b"h\x00s",
        "list that doubles": b"]q\x00(" + b"N" * 1000 + b"e"
        + call(name("builtins", "set"), b"h\x00") * 1000,
        "text encoded again and again": shared + b"](" + call(
            encode, b"h\x00", text("latin1")
        ) * 300 + b"e",
        "text as a key in tuples": shared + b"}("
        + b"h\x00\x85N" * 1000 + b"u",
        "bytes of a large number": call(name("builtins", "bytes"), number(2**40)),
        "bytearray of a large number": call(name("builtins", "bytearray"), number(2**40)),
        "list times": call(name("operator", "mul"), b"]", number(2**40)),
        "range": call(name("builtins", "range"), number(2**40)),
        "power": call(name("builtins", "pow"), number(9), number(2**60)),
        "colliding integer keys": b"}("
        + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(10**5))
        + b"u",
        "numpy zeros": call(name("numpy", "zeros"), group(number(2**40))),
        "numpy _reconstruct of a large shape": call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            group(number(2**40)),
            text("b"),
        ),
        "numpy dtype of a large width": call(name("numpy", "dtype"), text("U99999999999")),
        "stack underflow": b"0" * 1000,
        "set without items": b"\x90",
        "unbalanced group": b"t",
        "no end": b"N" * 10,
    }  # fmt: skip


# Those that reach the limits take seconds to trace, so they are read in one layout.
LONG = 10**5  # bytes
BOMBS = [
    pytest.param(bomb, zipped, marks=[pytest.mark.slow] if len(body) > LONG else [])
    for bomb, body in sorted(bombs().items())
    for zipped in ((True,) if len(body) > LONG else (True, False))
]


@pytest.mark.parametrize(("bomb", "zipped"), BOMBS)
def test_bombs_are_refused_or_inert(tmp_path, bomb, zipped, request):
    path = write(tmp_path / "x.pth", zipped, evil=bombs()[bomb])
    request.getfixturevalue("bounded")
    assert_harmless(path, tmp_path / "sentinel")


# Zip files


def zip_with(entries, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return bytearray(buffer.getvalue())


GOOD = program(mapping(weight=mapping(good=tensor())))
ENTRIES = [("a/data.pkl", GOOD), ("a/data/0", bytes(16))]


def duplicated():
    raw = zip_with([*ENTRIES, ("a/data.pkX", GOOD)])
    return raw.replace(b"a/data.pkX", b"a/data.pkl")


def patched(find, offset, change, count=1):
    raw = zip_with(ENTRIES)
    place = -1
    for _ in range(count):
        place = raw.index(find, place + 1)
    raw[place + offset : place + offset + len(change)] = change
    return raw


def overlapping():
    """Both directory records point at the first entry's bytes."""
    raw = zip_with([("a/data.pkl", GOOD), ("a/data/0", GOOD)])
    second = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1)
    raw[second + 42 : second + 46] = struct.pack("<I", 4)
    return raw


def fake_count(count):
    raw = zip_with(ENTRIES)
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 8 : end + 12] = struct.pack("<2H", count, count)
    return raw


def zip64(count=2, start=None, size=2**40, place=None):
    """A good zip whose end record defers to a forged 64-bit one."""
    raw = zip_with(ENTRIES)
    end = raw.rindex(b"PK\x05\x06")
    directory = raw.index(b"PK\x01\x02")
    tail = bytes(raw[end:])
    wide = struct.pack(
        "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size,
        directory if start is None else start,
    )  # fmt: skip
    locator = struct.pack(
        "<4sLQL", b"PK\x06\x07", 0, end if place is None else place, 1
    )
    tail = tail[:8] + b"\xff" * 12 + tail[20:]
    return raw[:end] + wide + locator + tail


ZIPS = {
    "two pickles of one name": duplicated,
    "two folders with a pickle": lambda: zip_with([*ENTRIES, ("b/data.pkl", GOOD)]),
    "pickle in a deep folder": lambda: zip_with([("a/b/data.pkl", GOOD)]),
    "overlapping entries": overlapping,
    "compressed": lambda: zip_with(ENTRIES, zipfile.ZIP_DEFLATED),
    "bomb": lambda: zip_with(
        [("a/data.pkl", GOOD), ("a/data/0", bytes(2**24))], zipfile.ZIP_DEFLATED
    ),
    "bzip2": lambda: zip_with(ENTRIES, zipfile.ZIP_BZIP2),
    "unknown method": lambda: patched(b"PK\x01\x02", 10, b"\x63\x00"),
    "encrypted": lambda: patched(b"PK\x01\x02", 8, b"\x01\x00"),
    "size beyond the file": lambda: patched(b"PK\x01\x02", 20, b"\xf0\xff\xff\x7f" * 2),
    "sizes that differ": lambda: patched(b"PK\x01\x02", 24, b"\x10\x00\x00\x00"),
    "place beyond the file": lambda: patched(b"PK\x01\x02", 42, b"\xf0\xff\xff\x7f"),
    "64-bit size without one": lambda: patched(b"PK\x01\x02", 20, b"\xff" * 8),
    "name longer than the file": lambda: patched(b"PK\x01\x02", 28, b"\xff\xff"),
    "name that is not UTF-8": lambda: patched(b"PK\x01\x02", 46, b"\xff\xfe"),
    "another name at the content": lambda: patched(b"PK\x03\x04", 30, b"b"),
    "no local header": lambda: patched(b"PK\x03\x04", 0, b"XXXX", 2),
    "local header of great length": lambda: patched(b"PK\x03\x04", 26, b"\xff\xff" * 2),
    "directory beyond the file": lambda: patched(b"PK\x05\x06", 16, b"\xf0\xff\xff\x7f"),
    "several disks": lambda: patched(b"PK\x05\x06", 4, b"\x01\x00"),
    "more entries than there are": lambda: fake_count(60),
    "60000 entries": lambda: fake_count(60000),
    "64-bit directory missing": lambda: patched(b"PK\x05\x06", 8, b"\xff" * 12),
    "64-bit directory of great size": zip64,
    "64-bit count": lambda: zip64(count=2**63, size=10),
    "64-bit start": lambda: zip64(start=2**63, size=10),
    "64-bit record elsewhere": lambda: zip64(place=2**60),
    "pickle too large": lambda: zip_with([("a/data.pkl", bytes(33 * 2**20))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ZIPS))
def test_hostile_zips_are_refused(tmp_path, kind, request):
    (tmp_path / "x.pth").write_bytes(ZIPS[kind]())
    request.getfixturevalue("bounded")
    with pytest.raises(ValueError, match=r"x\.pth: "):
        read_checkpoint(tmp_path / "x.pth")


def test_a_64_bit_directory_is_read(tmp_path):
    raw = zip_with(ENTRIES)
    size = raw.rindex(b"PK\x05\x06") - raw.index(b"PK\x01\x02")
    (tmp_path / "x.pth").write_bytes(zip64(size=size))
    assert list(read_checkpoint(tmp_path / "x.pth").tensors) == ["good"]


@pytest.mark.slow
def test_many_entries_stay_within_bounds(tmp_path, request):
    entries = [*ENTRIES, *((f"a/data/{i}", b"") for i in range(1, 49000))]
    (tmp_path / "x.pth").write_bytes(zip_with(entries))
    del entries
    request.getfixturevalue("bounded")
    assert_harmless(tmp_path / "x.pth", tmp_path / "sentinel")


# Safetensors


def safetensors(header, content=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + content


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = {
    "header of 2^63 bytes": safetensors({"x": entry()}, bytes(16), 2**63),
    "header of 2^40 bytes": safetensors({"x": entry()}, bytes(16), 2**40),
    "header of 100 MB": safetensors({"x": entry()}, bytes(16), 10**8),
    "header longer than the file": safetensors({"x": entry()}, bytes(16), 100000),
    "empty header": safetensors(b"{}", b"x"),
    "header not JSON": safetensors(b"{nonsense}"),
    "header not an object": safetensors(b"{}[]"),
    "nested header": safetensors(b'{"x":' + b"[" * 50000 + b"]" * 50000 + b"}"),
    "many brackets": safetensors(b'{"x":[' + b"[]," * 10**6 + b"[]]}"),
    "many small dicts": safetensors(b'{"x":[' + b'{"a":1},' * 500000 + b"1]}"),
    "name twice": safetensors(
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "overlap": safetensors({"x": entry(), "y": entry(offsets=(8, 24))}, bytes(24)),
    "same bytes": safetensors({"x": entry(), "y": entry()}, bytes(16)),
    "hole": safetensors({"x": entry(), "y": entry(offsets=(20, 36))}, bytes(36)),
    "bytes left over": safetensors({"x": entry()}, bytes(17)),
    "beyond the file": safetensors(
        {"x": entry(offsets=(2**40, 2**40 + 16))}, bytes(16)
    ),
    "size of another shape": safetensors({"x": entry(shape=(5,))}, bytes(16)),
    "cut data": safetensors({"x": entry()}, bytes(15)),
    "negative place": safetensors({"x": entry(offsets=(-16, 0))}, bytes(16)),
    "reversed place": safetensors({"x": entry(offsets=(16, 0))}, bytes(16)),
    "one place": safetensors({"x": entry(offsets=(0,))}, bytes(16)),
    "negative shape": safetensors({"x": entry(shape=(-2, -2))}, bytes(16)),
    "huge shape": safetensors({"x": entry(shape=(2**62, 4))}, bytes(16)),
    "huge empty shape": safetensors({"x": entry(shape=(0, 2**70), offsets=(0, 0))}),
    "shape of fractions": safetensors({"x": entry(shape=(4.0,))}, bytes(16)),
    "shape of booleans": safetensors({"x": entry("U8", (True,), (0, 1))}, b"x"),
    "many dimensions": safetensors({"x": entry(shape=(1,) * 70 + (4,))}, bytes(16)),
    "unknown type": safetensors({"x": entry("F8_E4M3", (4,), (0, 4))}, bytes(4)),
    "type of another kind": safetensors({"x": entry(["F32"])}, bytes(16)),
    "no description": safetensors({"x": 1}),
    "metadata not strings": safetensors({"__metadata__": {"x": [1]}}),
    "metadata not a dict": safetensors({"__metadata__": []}),
}


@pytest.mark.parametrize("kind", sorted(SAFETENSORS))
def test_hostile_safetensors_are_refused(tmp_path, kind, bounded):
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[kind])
    with pytest.raises(ValueError, match=r"x\.safetensors: "):
        read_checkpoint(tmp_path / "x.safetensors")


def test_metadata_that_is_no_json_stays_text(tmp_path, bounded):
    texts = {"deep": "[" * 50000, "broken": "nonsense {"}
    header = {"__metadata__": texts, "t": entry()}
    (tmp_path / "x.safetensors").write_bytes(safetensors(header, bytes(16)))
    assert read_checkpoint(tmp_path / "x.safetensors").metadata == texts


# Npz


def npy(header, content=b"", version=1):
    raw = header.encode()
    width = "<H" if version == 1 else "<I"
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack(width, len(raw))
        + raw
        + content
    )


def shape_header(shape, descr="'<f4'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def object_npz(sentinel):
    class Evil:
        def __reduce__(self):
            return (open, (str(sentinel), "w"))

    buffer = io.BytesIO()
    np.savez(
        buffer, good=np.arange(4, dtype=np.float32), evil=np.array([Evil()], object)
    )
    return buffer.getvalue()


def test_npz_with_pickled_objects_is_refused(tmp_path):
    sentinel = tmp_path / "sentinel"
    (tmp_path / "x.npz").write_bytes(object_npz(sentinel))
    sentinel.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"evil\.npy.*Python objects"):
        read_checkpoint(tmp_path / "x.npz")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [
        npy(shape_header("(4,)"), bytes(15)),
        npy(shape_header("(4,)"), bytes(17)),
        npy(shape_header("(-4,)"), bytes(16)),
        npy(shape_header(f"({2**62}, 4)"), bytes(16)),
        npy(shape_header("(" + "1, " * 70 + ")"), bytes(4)),
        npy(shape_header("(" + "9" * 350 + ",)"), bytes(16)),
        npy(shape_header("(4,)", "'|O'"), bytes(32)),
        npy(shape_header("(4,)", "[('x', '<f4')]"), bytes(16)),
        npy(shape_header("(4,)", "'<f16'"), bytes(64)),
        npy(shape_header("(4,)", "'<f99'"), bytes(64)),
        npy(shape_header("__import__('os').system('x')"), bytes(16)),
        npy(shape_header("(4,)", order="exit()"), bytes(16)),
        npy("{" * 60000, bytes(16)),
        npy(shape_header("(4,)"), bytes(16), version=3),
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY",
        b"\x80\x02}.",
        b"",
    ],
)
def test_hostile_npy_entries_are_refused(tmp_path, content, bounded):
    (tmp_path / "x.npz").write_bytes(zip_with([("x.npy", content)]))
    with pytest.raises(ValueError, match=r"x\.npz: "):
        read_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 10**5, b"\xff"])
def test_hostile_npz_metadata_is_refused(tmp_path, content, bounded):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for key, array in {
            "x": np.ones(1),
            "__metadata__": np.frombuffer(content, np.uint8),
        }.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            archive.writestr(f"{key}.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="metadata"):
        read_checkpoint(tmp_path / "x.npz")


# Random programs


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_end_in_a_result_or_a_clear_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sentinel = tmp_path / "sentinel"
    parts = list(payloads(sentinel).values())
    parts += [
        tensor(),
        array(),
        ORDERED_DICT,
        STORAGE,
        text("x"),
        number(3),
        b"]",
        b"}",
    ]
    single = [
        bytes([b]) for b in b"(0123)]}NtaesuRbQoq\x00h\x00\x81\x85\x86\x87\x91\x92\x93"
    ]
    for _ in range(300):
        picks = [
            parts[rng.integers(len(parts))]
            if rng.random() < 0.4
            else single[rng.integers(len(single))]
            for _ in range(rng.integers(2, 25))
        ]
        body = b"".join(picks)
        write_zip(
            tmp_path / "x.pth", program(mapping(weight=mapping(good=tensor()), z=body))
        )
        assert_harmless(tmp_path / "x.pth", sentinel)
