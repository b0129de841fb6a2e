"""Runs the networks: MLX on a GPU, or the same MLX graph compiled by OpenVINO on a CPU.

A *seam* is one step of the conversion that goes through a network at once. An engine
turns a seam into a callable of numpy arrays; numpy becomes ``mx.array`` only here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx import (
    fused_encoder,
    fused_prior,
    fused_source,
    fused_unet,
    product_convs,
)
from rvc_mlx.arrays import Array, to_host
from rvc_mlx.audio import HighPass, high_pass_spools
from rvc_mlx.compiling import Replayed
from rvc_mlx.device_high_pass import device_high_pass
from rvc_mlx.device_index import DeviceIndex
from rvc_mlx.device_mel import device_log_mel
from rvc_mlx.feature_index import Index
from rvc_mlx.fused_blocks import FusedBlocks
from rvc_mlx.fused_joints import quicken_joints
from rvc_mlx.gru_kernel import checked, supports
from rvc_mlx.models.contentvec import ContentVec
from rvc_mlx.models.nsf_hifigan import HiFiGAN, SineSource
from rvc_mlx.models.rmvpe import GRU, RMVPE
from rvc_mlx.models.synthesizer import Synthesizer
from rvc_mlx.noise import DeviceNoise, Noise
from rvc_mlx.retrieval import Blend, blending
from rvc_mlx.spectral import LogMel, log_mel
from rvc_mlx.spool import Spool
from rvc_mlx.steady import Rows, Steady

log = logging.getLogger("rvc_mlx")

DEVICES = ("auto", "gpu", "cpu", "mlx-cpu")
PRECISIONS = ("auto", "f32", "bf16", "f16")

_DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
# Kernels of past lengths that OpenVINO keeps per network, and oneDNN under it. By default
# every new length adds 3 MB a network for ever; making them again takes milliseconds.
_KEPT_KERNELS, _KEPT_PRIMITIVES = 0, "16"
_BATCHES = 64  # times that the largest array of a batch would fit into a GPU
_LARGEST_BATCH = 1 << 29  # bytes of that array; more together gain nothing
_QUEUES = 3  # times that the arrays beside the weights, used or kept, would fit
_LONGEST_QUEUE = 48 << 30  # bytes of them; where there are more, MLX frees and waits
_INDEXES = 8  # times that the largest index searched there would
_CACHE_LIMIT = 8 << 30  # bytes of compiled models kept, least recently used go first

_LIMIT = Lock()  # MLX has one limit of memory for all threads

Step = Callable[..., mx.array]


class Run(Protocol):
    """A seam bound to an engine."""

    def __call__(self, *arrays: Array) -> np.ndarray:
        """The result, float32 on the host."""

    def start(self, *arrays: Array) -> Array:
        """The result where it was made, float32; it may still be computing."""


@dataclass(frozen=True)
class Seam:
    """One network step to be compiled.

    Attributes:
        name: for messages and profiles.
        identity: changes whenever weights or configuration change; names the compiled
            model on disk.
        build: loads the weights in the given type and returns the steps, each a pure
            function of the one before; a ``GRU`` runs as the back end does it best.
        inputs: shapes of the inputs at a length, each with its type.
        lengths: one length: that is the only one used; three: the length is dynamic.
        exact: float32 whatever the precision.
        beside: whether it is computed beside the others, which do not wait for it.
    """

    name: str
    identity: str
    build: Callable[[mx.Dtype], Sequence[Step]]
    inputs: Callable[[int], Sequence[tuple[tuple[int, ...], mx.Dtype]]]
    lengths: tuple[int, ...]
    exact: bool = False
    beside: bool = False


class WindowSizes(NamedTuple):
    """Frames that a vocoder decodes at once, without their context.

    Attributes:
        most: frames.
        step: they are a multiple of it, up to that.
        few: whether a segment alone has few lengths of them.
    """

    most: int
    step: int
    few: bool = False


class MLXEngine:
    """Runs seams with MLX on a GPU, or on MLX's own CPU back end (slow on Linux).

    Attributes:
        device: what computes, in words.
        precision: ``"f32"``, ``"bf16"`` or ``"f16"``.
        window_frames: most frames that a vocoder decodes at once, see ``windows``.
        window_step: its windows are a multiple of it, up to that.
        batch_bytes: most memory for the largest array of inputs that are computed
            together, all arrays of a network take several times as much; 0 where one
            input keeps the device busy.
        log_mel: see ``spectral.log_mel``; on a GPU where products may be short of float32.
        high_pass: see ``audio.high_pass_spools``; with CUDA on the GPU.
    """

    window_frames = 3072
    window_step = 256

    def __init__(self, device: mx.Device, precision: str, tf32: bool = True):
        self._device = device
        self._fast_products = tf32 or precision != "f32"
        on_gpu = device == mx.Device(mx.gpu)
        # The host's is exact, and spreads chunks over threads where it is known as such.
        self.log_mel: LogMel = (
            self._log_mel if on_gpu and self._fast_products else log_mel
        )
        on_cuda = on_gpu and mx.cuda.is_available()
        self.high_pass: HighPass = self._high_pass if on_cuda else high_pass_spools
        # The recurrent layer of RMVPE leaves most of a GPU to what runs beside it.
        self._two_streams = on_cuda
        self._streams = threading.local()  # a stream belongs to its thread
        # A thread has a stream of its own: what it does waits for no network.
        self._aside = ThreadPoolExecutor(1)
        self.precision = precision
        self.device = describe_device(device)
        memory = _gpu_memory(device)
        self.batch_bytes = min(memory // _BATCHES, _LARGEST_BATCH)
        self._queued = min(memory // _QUEUES, _LONGEST_QUEUE)
        self._resident = 0  # bytes in use when the last network was loaded
        self._index_bytes = memory // _INDEXES

    @property
    def _quickens(self) -> bool:
        """Whether networks compute with CUDA kernels that are short of float32."""
        on_cuda = self._device == mx.Device(mx.gpu) and mx.cuda.is_available()
        return self._fast_products and on_cuda

    def bind(self, seam: Seam) -> Run:
        """The seam on this device; weights are loaded at its first run."""
        return _MLXRun(self, seam)

    def beside(self) -> AbstractContextManager[Any]:
        """Where the inputs of a seam are made that is computed beside the others.

        Elsewhere they would be made behind what is queued there.
        """
        return mx.stream(self._stream(True))

    def _stream(self, beside: bool) -> mx.Device | mx.Stream:
        """Where a seam is computed."""
        if not (beside and self._two_streams):
            return self._device
        if not hasattr(self._streams, "beside"):
            self._streams.beside = mx.new_stream(self._device)
        stream: mx.Stream = self._streams.beside
        return stream

    def windows(self, vocoder: nn.Module) -> WindowSizes:
        """The windows of a vocoder.

        Where no convolution is left to a library, no length is planned, and memory is
        ample: a segment is one window then.
        """
        if self._quickens and product_convs.serves(vocoder):
            return WindowSizes(4608, 8, few=True)
        return WindowSizes(self.window_frames, self.window_step)

    def noise(self, seed: int) -> Noise:
        """Random numbers where they will be used."""
        on_host = self._device == mx.Device(mx.cpu)
        return Noise(seed) if on_host else DeviceNoise(seed)

    def blending(self, index: Index) -> Blend:
        """Retrieval where the features are; on the host if the vectors fill a GPU."""
        if DeviceIndex.memory(index) > self._index_bytes:
            if self._index_bytes:
                log.info("%s is searched on the host: it is too large", index.path)
            return blending(index)
        searched = DeviceIndex(index)
        return lambda features, rate, exact: searched.blend(
            mx.array(features), rate, exact=exact
        )

    def _begin(self, output: mx.array) -> None:
        """Queue a result's computation.

        On CUDA MLX would make the arrays of a whole network before the first is computed.
        """
        if self._queued and mx.cuda.is_available():
            with _memory_limit(self._resident + self._queued):
                mx.async_eval(output)
        else:
            mx.async_eval(output)

    def _log_mel(self, samples: Array, n_mels: int) -> Array:
        with mx.stream(self._device):
            return device_log_mel(samples, n_mels)

    def _high_pass(
        self, sources: Sequence[Spool], gains: Sequence[float]
    ) -> list[Spool]:
        def filtered() -> list[Spool]:
            with mx.stream(self._device):
                return device_high_pass(sources, gains)

        return self._aside.submit(filtered).result()

    def _prepared(self, step: Step) -> Step:
        """The step as this device does it best."""
        if self._device == mx.Device(mx.cpu):
            return step  # MLX's CPU back end would call a C compiler for each fusion
        network = _network_of(step)
        if isinstance(network, RMVPE) and mx.cuda.is_available():
            fused_unet.quicken(network, self._fast_products)
        if self._quickens:
            if isinstance(network, HiFiGAN):
                network._average = FusedBlocks(network)
                product_convs.quicken_convs(network)
                quicken_joints(network)
            elif isinstance(network, ContentVec):
                fused_encoder.quicken(network)
            elif isinstance(network, Synthesizer):
                fused_prior.quicken(network)
            elif getattr(step, "__func__", None) is SineSource.from_frames:
                step = functools.partial(fused_source.from_frames, network)
        if isinstance(step, GRU):
            return checked(step) if supports(step) else step
        # On CUDA each fusion would take seconds once; see ``_joined``.
        return mx.compile(step) if mx.metal.is_available() else step

    def _joined(self, steps: Sequence[Step]) -> Step:
        """Prepared steps as one, to float32."""

        def network(*arrays: mx.array) -> mx.array:
            for step in steps:
                arrays = (step(*arrays),)
            return arrays[0].astype(mx.float32)

        # What is not to be short of float32 stays as it is: its GELU would be five passes.
        # So does a plain loop over frames: MLX walks a graph to its end by recursion.
        if not self._quickens:
            return network
        if any(isinstance(step, GRU) for step in steps):
            return network
        rows = _rows_of(steps[0])
        few = self.windows(_network_of(steps[0])).few
        try:
            return Steady(network, rows) if rows or few else Replayed(network)
        except RuntimeError as error:
            log.info("graphs are built anew at each call: %s", error)
            return network


def _network_of(step: Step) -> Any:
    return getattr(step, "func", getattr(step, "__self__", step))


def _rows_of(step: Step) -> Rows | None:
    """How a network whose first prepared step this is takes longer inputs, if it does."""
    network = _network_of(step)
    if isinstance(network, ContentVec):
        return fused_encoder.rows_of_features(network)
    if isinstance(network, RMVPE):
        return fused_unet.rows_of_salience(network)
    if getattr(step, "__func__", None) is Synthesizer.prior:
        return fused_prior.rows_of_prior(network)
    return None


class _MLXRun:
    """A seam on an ``MLXEngine``."""

    def __init__(self, engine: MLXEngine, seam: Seam):
        self._engine, self._seam = engine, seam
        self._network: Step | None = None
        self._dtype = mx.float32 if seam.exact else _DTYPES[engine.precision]

    def __call__(self, *arrays: Array) -> np.ndarray:
        return to_host(self.start(*arrays))

    def start(self, *arrays: Array) -> mx.array:
        engine = self._engine
        with mx.stream(engine._stream(self._seam.beside)):
            if self._network is None:
                steps = self._seam.build(self._dtype)
                self._network = engine._joined(list(map(engine._prepared, steps)))
                engine._resident = mx.get_active_memory()
            inputs = [_as_input(array, self._dtype) for array in arrays]
            output = self._network(*inputs)
            engine._begin(output)
            return output


@contextmanager
def _memory_limit(limit: int) -> Iterator[None]:
    """What is queued meanwhile waits where all arrays would take more than ``limit``."""
    with _LIMIT:
        before = mx.set_memory_limit(limit)
        try:
            yield
        finally:
            mx.set_memory_limit(before)


def _as_input(array: Array, dtype: mx.Dtype) -> mx.array:
    result = array if isinstance(array, mx.array) else mx.array(array)
    return result.astype(dtype) if result.dtype == mx.float32 else result


class OpenVINOEngine:
    """Runs seams on the CPU through OpenVINO, compiled once and kept on disk.

    Attributes:
        device: what computes, in words.
        precision: ``"f32"``, ``"bf16"`` or ``"f16"``.
        window_frames: most frames that the vocoder decodes at once.
        window_step: windows are a multiple of it, up to that.
        batch_bytes: 0, networks are compiled for one input at a time.
        log_mel: ``spectral.log_mel``.
        high_pass: ``audio.high_pass_spools``.
    """

    window_frames = window_step = 128  # one length, for which the vocoder is compiled
    batch_bytes = 0
    log_mel = staticmethod(log_mel)
    high_pass = staticmethod(high_pass_spools)

    def __init__(self, precision: str, cache: Path | None):
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_PRIMITIVES)
        import openvino

        self._core = openvino.Core()
        self._cache = cache
        self._mapped: list[Any] = []
        self._readers = ThreadPoolExecutor(2)
        self.precision = precision
        name = self._core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        self.device = f"CPU ({name}, OpenVINO)"

    def bind(self, seam: Seam) -> Run:
        """A callable for the seam; compiled at its first call.

        What an earlier process has compiled is read back at once, beside other work.
        """
        path = self._cache_path(seam)
        read = self._readers.submit(self._read_back, path, self._options(seam))
        return _OpenVINORun(lambda: read.result() or self._compile(seam, path))

    def beside(self) -> AbstractContextManager[Any]:
        """Where the inputs of a seam are made: on the host."""
        return nullcontext()

    def windows(self, _: nn.Module) -> WindowSizes:
        """The windows of a vocoder."""
        return WindowSizes(self.window_frames, self.window_step)

    def noise(self, seed: int) -> Noise:
        """Random numbers where they will be used."""
        return Noise(seed)

    def blending(self, index: Index) -> Blend:
        """Retrieval where the features are."""
        return blending(index)

    def _options(self, seam: Seam) -> dict[str, Any]:
        precision = "f32" if seam.exact else self.precision
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        if len(seam.lengths) > 1:
            options["CPU_RUNTIME_CACHE_CAPACITY"] = _KEPT_KERNELS
        if threads := os.environ.get("OMP_NUM_THREADS"):
            outermost = threads.split(",")[0]  # a list gives nested levels
            options["INFERENCE_NUM_THREADS"] = int(outermost)
        return options

    def _compile(self, seam: Seam, path: Path | None) -> Any:
        log.info("compiling %s for the CPU (once)", seam.name)
        options = self._options(seam)
        compiled = self._core.compile_model(to_openvino(seam), "CPU", options)
        if path:
            _store(path, compiled.export_model())
        return compiled

    def _read_back(self, path: Path | None, options: dict[str, Any]) -> Any:
        """The compiled model of an earlier process; None if there is none."""
        import openvino

        if path is None or not path.exists():
            return None
        try:
            os.utime(path)
            # Copy-on-write, because OpenVINO wants a writable array; nothing writes.
            blob = np.memmap(path, np.uint8, "c")
            tensor = openvino.Tensor(blob, shared_memory=True)
            compiled = self._core.import_model(tensor, "CPU", options)
        except (RuntimeError, ValueError):  # damaged, or empty
            log.warning("%s is damaged; compiling again", path)
            return None
        self._mapped.append(tensor)  # the compiled model reads its weights there
        return compiled

    def _cache_path(self, seam: Seam) -> Path | None:
        if self._cache is None:
            return None
        parts = (
            seam.identity,
            seam.name,
            repr(seam.lengths),
            repr(sorted(self._options(seam).items())),
            self.device,
            importlib.metadata.version("openvino"),
            importlib.metadata.version("mlx"),
            _source_hash(),
        )
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return self._cache / f"{digest}.blob"


class _OpenVINORun:
    """A seam on an ``OpenVINOEngine``."""

    def __init__(self, compiled: Callable[[], Any]):
        self._compiled = compiled
        self._request: Any = None

    def __call__(self, *arrays: Array) -> np.ndarray:
        if self._request is None:
            self._request = self._compiled().create_infer_request()
        self._request.infer([to_host(array) for array in arrays], share_inputs=True)
        result: np.ndarray = self._request.get_output_tensor(0).data.copy()
        return result

    start = __call__


def to_openvino(seam: Seam) -> Any:
    """The seam as one OpenVINO model in float32."""
    import openvino

    from rvc_mlx.openvino_graph import translate
    from rvc_mlx.openvino_ops import gru_sequence

    with mx.stream(mx.cpu):
        steps = seam.build(mx.float32)
        examples = [
            [mx.zeros(shape, dtype) for shape, dtype in seam.inputs(length)]
            for length in seam.lengths
        ]
        inputs: list[Any] | None = None
        nodes: list[Any] | None = None
        for step in steps:
            if isinstance(step, GRU):
                assert nodes is not None
                nodes = [gru_sequence(nodes[0], step.stacked(), step.hidden_size)]
            else:
                heads, nodes = translate(step, examples, nodes)
                inputs = heads if inputs is None else inputs
            if step is not steps[-1]:
                examples = [[_result_like(step, example)] for example in examples]
    return openvino.Model(nodes, inputs, seam.name)


def _result_like(step: Step, example: Sequence[mx.array]) -> mx.array:
    """Zeros of the shape that ``step`` gives, without computing it."""
    if isinstance(step, GRU):
        return mx.zeros((*example[0].shape[:-1], 2 * step.hidden_size))
    return mx.zeros(step(*example).shape)


def _store(path: Path, blob: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    data = blob.getbuffer() if hasattr(blob, "getbuffer") else blob
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _prune(path.parent)


def _prune(folder: Path) -> None:
    """Delete the least recently used compiled models beyond the limit."""
    files = sorted(folder.glob("*.blob"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > _CACHE_LIMIT:
            file.unlink(missing_ok=True)


@functools.cache
def _source_hash() -> str:
    """Hash of the code that decides what a compiled model computes."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*here.glob("openvino_*.py"), *here.glob("models/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint(path: Path, *settings: object) -> str:
    """Identity of a weight file without reading all of it, joined with settings."""
    status = path.stat()
    digest = hashlib.sha256(
        repr((status.st_size, status.st_mtime_ns, settings)).encode()
    )
    with path.open("rb") as file:
        digest.update(file.read(1 << 16))
        file.seek(max(0, status.st_size - (1 << 16)))
        digest.update(file.read())
    return digest.hexdigest()


def describe_device(device: mx.Device) -> str:
    """Device as a person would name it."""
    if device == mx.Device(mx.cpu):
        return f"CPU ({platform.processor() or platform.machine()}, MLX)"
    info = mx.device_info(device)
    backend = "CUDA" if mx.cuda.is_available() else "Metal"
    return f"GPU ({info.get('device_name', 'unknown')}, MLX {backend})"


def _gpu_memory(device: mx.Device) -> int:
    """Bytes of a GPU's memory; 0 for MLX's CPU back end."""
    if device == mx.Device(mx.cpu):
        return 0
    info = mx.device_info(device)  # the name of the figure depends on the back end
    return int(info.get("total_memory", info.get("memory_size", 0)))


def gpu_available() -> bool:
    """Whether MLX has a GPU back end that works here."""
    return bool(mx.cuda.is_available() or mx.metal.is_available())


def openvino_available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def cpu_precisions() -> list[str]:
    """Precisions that this CPU computes in hardware, the fastest last."""
    import openvino

    listed = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
    return [name for name, capability in names.items() if capability in listed]


def choose_engine(
    device: str = "auto", precision: str = "auto", cache: Path | None = None
) -> MLXEngine | OpenVINOEngine:
    """The engine for a device and precision, or an error; never another one.

    ``auto`` takes the GPU when MLX has one, else the CPU. Precision ``auto`` is bf16 on
    CPUs that compute it in hardware, f32 elsewhere. On NVIDIA GPUs ``auto`` lets float32
    products use TF32, ``f32`` does not.

    Args:
        device: one of ``DEVICES``.
        precision: one of ``PRECISIONS``.
        cache: folder for compiled models, None to keep none.

    Raises:
        ValueError: the device or precision is not to be had here; says what is.
    """
    if device not in DEVICES:
        raise ValueError(
            f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
        )
    if device == "auto":
        device = "gpu" if gpu_available() else "cpu"
    if device == "cpu":
        return _openvino_engine(precision, cache)
    if device == "gpu" and not gpu_available():
        raise ValueError(
            "device 'gpu' was asked for, but MLX has no GPU here; use --device cpu, or "
            "install rvc-mlx[cuda] on a machine with an NVIDIA GPU"
        )
    exact = precision == "f32"
    if exact:
        os.environ["MLX_ENABLE_TF32"] = "0"
    kind = mx.Device(mx.gpu if device == "gpu" else mx.cpu)
    precision = "f32" if precision == "auto" else precision
    return MLXEngine(kind, precision, tf32=not exact)


def _openvino_engine(precision: str, cache: Path | None) -> OpenVINOEngine:
    if not openvino_available():
        raise ValueError(
            "device 'cpu' needs OpenVINO, which is not installed; run "
            "pip install 'rvc-mlx[cpu]', or use --device mlx-cpu (slow)"
        )
    offered = cpu_precisions()
    if precision == "auto":
        precision = "bf16" if "bf16" in offered else "f32"
    if precision not in offered:
        raise ValueError(
            f"precision {precision!r} was asked for, but this CPU computes "
            f"{', '.join(offered)} in hardware; use one of these or auto"
        )
    return OpenVINOEngine(precision, cache)
