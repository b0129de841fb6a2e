"""CUDA kernels of our own: their source compiles, and is compiled once."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from recipes import augment
from rvc_mlx import (
    attention_kernel,
    conv_kernel,
    cuda_kernel,
    device_high_pass,
    elementwise,
    fused_encoder,
    fused_joints,
    fused_norm,
    fused_prior,
    fused_source,
    fused_unet,
    fused_waveform,
    gru_kernel,
    image_conv,
    normed_conv,
    plane_kernel,
    salience_kernel,
    step_kernel,
    windows,
)
from rvc_mlx.cuda_kernel import CudaKernel, Grid, compile_source
from rvc_mlx.training import fused, weight_norm

F32, BF16, F16, INT = mx.float32, mx.bfloat16, mx.float16, mx.int32

DOUBLED = CudaKernel(
    "doubled",
    ("x",),
    ("y",),
    "if (threadIdx.x < n) y[threadIdx.x] = T(factor * float(x[threadIdx.x]));\n",
    (("n", "int"), ("factor", "float")),
)


def has_nvrtc():
    try:
        cuda_kernel._nvrtc()
    except RuntimeError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC")


def convolutions():
    same = [3 * (dtype,) for dtype in conv_kernel.DTYPES]
    short = [(F32, F16, F32), (F32, F16, F16), (F16, F16, F32)]
    for dtype, products, out in same + short:
        for channels in conv_kernel.CHANNELS:
            tile = conv_kernel.default_tile(channels, products, dtype)
            constants = conv_kernel._constants(dtype, products, channels, tile, out)
            inputs = (dtype, products, F32, out, out, F32)
            yield conv_kernel._KERNEL, inputs, (out,), constants
    for dtype, products in ((F32, F16), (F16, F16), (BF16, BF16)):
        for channels in (c for c in conv_kernel.CHANNELS if c <= 128):
            tile = conv_kernel.candidate_tiles(channels, products)[0]
            constants = conv_kernel._constants(
                dtype, products, channels, tile, dtype, step=True
            )
            inputs = (dtype, products, F32, dtype, dtype, F32)
            yield conv_kernel._KERNEL, inputs, (dtype,), constants


def steps():
    for dtype, products in ((F32, F16), (F16, F16), (BF16, BF16)):
        for channels in step_kernel.TILES:
            constants = step_kernel._constants(dtype, products, channels, True)
            inputs = (dtype, products, F32, F32, dtype)
            yield step_kernel._kernel(channels), inputs, (dtype,), constants


def images():
    for dtype, products in ((F32, F16), (F16, F16), (BF16, BF16)):
        for outputs, inputs, side, across, places in (
            *((16, 16, 3, 16, 1 << 20), (32, 64, 3, 16, 1 << 20)),
            *((64, 32, 3, 8, 1 << 20), (512, 256, 3, 4, 376), (32, 16, 1, 16, 376)),
        ):
            weight = image_conv.PackedImageWeight(
                mx.zeros((side * side, outputs, inputs), products), outputs, side
            )
            tile = image_conv.choose_tile(places, outputs)
            constants = image_conv._constants(
                dtype, products, weight.array.shape, side, tile, across
            )
            inputs = (dtype, products, F32, dtype, INT)
            yield image_conv._KERNEL, inputs, (dtype,), constants


def planes():
    for dtype, products in ((F32, F16), (F16, F16), (BF16, BF16)):
        for inputs, outputs, side in (
            (16, 16, 3),
            (64, 32, 3),
            (512, 64, 3),
            (32, 64, 2),
        ):
            tile = plane_kernel.Tile(2, 2, outputs)
            constants = plane_kernel._constants(
                *(dtype, products, tile, side, inputs), True
            )
            given = (dtype, products, F32, dtype, INT)
            yield plane_kernel._kernel(outputs), given, (dtype,), constants


def others():
    for dtype in (F16, BF16):
        attention = {"T": dtype, **attention_kernel._SIZES}
        yield attention_kernel._KERNEL, (dtype, INT), (dtype,), attention
    yield gru_kernel._CLUSTER_KERNEL, (F32, F32, F32, INT), (F32,), {}
    yield fused_source._KERNEL, 7 * (F32,), (F32,), {}
    decoding = {"FRAMES": salience_kernel._FRAMES, "NEAR": 4}
    yield salience_kernel._KERNEL, (F32,), (INT, F32), decoding
    for recording in (True, False):
        constants = {"RECORDING": recording}
        yield device_high_pass._kernel(), (F32, F32, INT), (F32,) * 2, constants
    yield weight_norm._FORWARD_KERNEL, (F32, INT), (F32,), {}
    yield weight_norm._BACK_KERNEL, (F32, F32, INT), (F32,), {}
    sizes = {"TAPS": 16, "FIRST": 16, "RATE_STEPS": 4096}
    yield augment._RESAMPLE, (F32, F32), (F32,), sizes
    for dtype in (F32, BF16, F16):
        unet = {"T": dtype, "PACK": elementwise.PACK}
        yield fused_unet._KERNEL, (dtype, F32, dtype, F32), (dtype,), unet
        yield fused_unet._POOL, (dtype,), (dtype,), unet
        pack = {"T": dtype, "PACK": elementwise.PACK}
        for channels in (192, 768, 1000):
            row = {"ROWS": 8, "WIDTH": channels // 8, "EACH": -(-channels // 256)}
            for cut in dict.fromkeys((dtype, F16)):
                given = (dtype, cut, dtype, dtype)
                norm = pack | row | {"S": cut, "CUT": cut != dtype}
                yield fused_norm._KERNEL, given, (dtype, cut), norm
        yield elementwise.GELU, (dtype,), (dtype,), pack
        yield fused._GELU_BACK, (dtype, dtype), (dtype,), pack
        yield fused_prior.GATE, (dtype,), (dtype,), pack
        sizes = {"T": dtype, "TAPS": 10, "STRIDE": 5, "COLUMNS": 16, "THREADS": 256}
        seen = sizes | {"EACH": 4}
        yield normed_conv._SEEN, (dtype, INT), (dtype, F32), seen
        groups = pack | {"STEP": 8}
        yield fused_encoder._SEEN, (dtype, INT), (dtype,), groups
        yield fused_encoder._TOGETHER, (dtype, dtype), (dtype,), groups
        rows = (dtype, INT, F32, dtype, dtype, dtype)
        yield normed_conv._WEIGHTS, rows, (dtype,), sizes
        yield fused_joints._KERNEL, (dtype, dtype, F32), (dtype,), pack
        for channels in (16, 32, 256):
            end = fused_waveform._constants(dtype, channels, 7)
            yield fused_waveform._KERNEL, (dtype,) * 3, (F32,), end
        yield fused_prior._HEADS, (dtype,), 3 * (dtype,), pack | {"WINDOW": 10}
        for kept in (True, False):
            row = {"T": dtype, "WINDOW": 10, "THREADS": 256, "KEPT": kept}
            yield fused_prior._SOFTMAX, (dtype, dtype, INT), 2 * (dtype,), row
        yield windows._KERNEL, (dtype, INT), (dtype,), pack
        yield fused_prior._ADD_HALVES, 3 * (dtype,), 2 * (dtype,), pack
        yield fused._GATE_BACK, (dtype, dtype), (dtype,), pack
        yield fused._FORWARD, (dtype,), (dtype,), {"T": dtype}
        yield fused._BACK, (dtype, dtype), (dtype,), {"T": dtype}


def compiles(kernel, inputs, outputs, constants, architecture):
    constants = (*constants.items(), ("SHARED_MEMORY", 0))
    code = compile_source(kernel.text(inputs, outputs, constants), architecture)
    assert code.startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.parametrize(
    "case", [*convolutions(), *steps(), *images(), *planes(), *others()]
)
def test_every_kernel_compiles_for_an_h100(case):
    compiles(*case, "sm_90a")


@needs_nvrtc
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_pitch_nets_kernel_compiles_for_older_gpus(dtype):
    constants = {"T": dtype, "PACK": elementwise.PACK}
    compiles(fused_unet._KERNEL, (dtype, F32, dtype, F32), (dtype,), constants, "sm_75")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89"])
def test_older_gpus_have_a_kernel_without_clusters(architecture):
    compiles(gru_kernel._POLLING_KERNEL, (F32,) * 4, (F32,), {}, architecture)


@needs_nvrtc
def test_a_source_that_is_wrong_is_refused_with_the_compilers_words():
    with pytest.raises(RuntimeError, match=r'sm_90: .*"nothing" is undefined'):
        compile_source('extern "C" __global__ void f() { nothing; }', "sm_90")


def test_the_text_tells_types_numbers_and_constants():
    text = DOUBLED.text((BF16,), (F32,), (("T", F32), ("ON", True), ("SIZE", 7)))
    assert text.endswith(
        """extern "C" __global__ void  KERNEL(
    const bfloat16* x,
    float* y,
    int n,
    int factor_bits) {
const float factor = __int_as_float(factor_bits);
using T = float;
constexpr int ON = 1;
constexpr int SIZE = 7;
if (threadIdx.x < n) y[threadIdx.x] = T(factor * float(x[threadIdx.x]));
}"""
    )


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A stand-in for NVRTC; its calls."""
    monkeypatch.setenv("RVC_MLX_HOME", str(tmp_path))
    calls = []

    def stand_in(text, architecture):
        calls.append((text, architecture))
        return b"code"

    monkeypatch.setattr(cuda_kernel, "compile_source", stand_in)
    return calls


def compiled(factor=2, architecture="sm_90"):
    constants = (("T", F32), ("FACTOR", factor))
    return cuda_kernel._compiled(DOUBLED, (F32,), (F32,), constants, architecture)


def test_a_kernel_is_compiled_once_for_all_processes(compiler, tmp_path):
    symbol, code = compiled()
    assert code == b"code"
    assert symbol in compiler[0][0]
    assert compiled() == (symbol, code)
    assert len(compiler) == 1
    folder = tmp_path / "compiled" / "cuda"
    assert [path.name for path in folder.iterdir()] == [f"{symbol}.cubin"]


@pytest.mark.parametrize("left", [b"", b"half of it"])
def test_a_damaged_file_is_made_again(compiler, tmp_path, left):
    symbol, _ = compiled()
    [path] = (tmp_path / "compiled" / "cuda").iterdir()
    whole = path.read_bytes()
    path.write_bytes(left)
    assert compiled() == (symbol, b"code")
    assert path.read_bytes() == whole
    assert len(compiler) == 2


@pytest.fixture
def _no_architecture():
    cuda_kernel._architecture.cache_clear()
    yield
    cuda_kernel._architecture.cache_clear()


@pytest.mark.usefixtures("_no_architecture")
@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((12, 1), "sm_121")],
)
def test_architectures_have_their_names(monkeypatch, capability, name):
    major, minor = capability
    told = {"compute_capability_major": major, "compute_capability_minor": minor}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: told)
    assert cuda_kernel._architecture() == name


def test_each_set_of_constants_and_each_gpu_has_its_own(compiler):
    symbols = {compiled()[0], compiled(3)[0], compiled(architecture="sm_100")[0]}
    assert len(symbols) == len(compiler) == 3


@pytest.fixture
def told(compiler, monkeypatch):
    """What MLX is told of each launch."""
    launches = []
    monkeypatch.setattr(cuda_kernel, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(
        mx.fast, "precompiled_cuda_kernel", lambda **given: launches.append(given)
    )
    return launches


def launch(kernel, dtype=F32, constant=2, memory=0, scalars=(4, 2.0)):
    kernel(
        [mx.zeros(4, dtype)],
        [((4,), F32)],
        Grid(3, 32, 2, memory),
        scalars=scalars,
        constants={"T": F32, "FACTOR": constant},
    )


def test_a_launch_finds_what_was_compiled_for_the_same(compiler, told):
    kernel = replace(DOUBLED)
    for given in ({}, {"dtype": F16}, {"constant": 3}, {"memory": 64}):
        launch(kernel, **given)
        launch(kernel, **given)
    names = [given["name"] for given in told]
    assert names[::2] == names[1::2]
    assert len(set(names)) == len(compiler) == 4
    assert (told[0]["grid"], told[0]["threadgroup"]) == ((96, 2, 1), (32, 1, 1))
    assert [given["shared_memory"] for given in told[-3:]] == [0, 64, 64]
    launch(replace(kernel, source=kernel.source + ";"))
    assert told[-1]["name"] not in names


@pytest.mark.parametrize(
    ("scalars", "bits"),
    [
        ((True, 2.5), [1, 0x40200000]),
        ((3, 1), [3, 0x3F800000]),
        ((-3.0, 1), [-3, 0x3F800000]),
        ((1 << 40, 0.0), [1 << 40, 0]),
        ((0, -0.0), [0, -(1 << 31)]),
        ((0, np.float64(1 / 3)), [0, 0x3EAAAAAB]),
        ((0, np.inf), [0, 0x7F800000]),
    ],
)
def test_numbers_are_told_as_whole_ones(told, scalars, bits):
    launch(DOUBLED, scalars=scalars)
    assert told[0]["scalars"] == bits
    assert {type(number) for number in told[0]["scalars"]} == {int}


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_number_too_large_is_infinite(told):
    launch(DOUBLED, scalars=(0, 1e40))
    assert told[0]["scalars"] == [0, 0x7F800000]


@pytest.mark.parametrize("scalars", [(4,), (4, 2.0, 1.0)])
def test_too_few_or_too_many_numbers_are_refused(told, scalars):
    with pytest.raises(ValueError, match="zip"):
        launch(DOUBLED, scalars=scalars)


def test_a_folder_that_cannot_be_written_costs_only_time(compiler, tmp_path):
    (tmp_path / "compiled").write_text("not a folder")
    assert compiled()[1] == b"code"


@pytest.mark.skipif(mx.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_a_launch_is_refused():
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        DOUBLED([mx.zeros(4)], [((4,), F32)], Grid(1, 32), scalars=[4, 2.0])


@pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_kernel_runs_with_its_numbers(dtype):
    x = mx.arange(8).astype(dtype)
    (y,) = DOUBLED(
        [x[::-1]],
        [((8,), F32)],
        Grid(1, 32),
        scalars=[8, 2.5],
        constants={"T": F32},
    )
    assert y.tolist() == [2.5 * n for n in range(7, -1, -1)]
