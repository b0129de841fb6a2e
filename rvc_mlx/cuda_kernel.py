"""CUDA kernels of our own: compiled once by NVRTC, kept on disk, launched by MLX.

``mx.fast.cuda_kernel`` compiles its source again in every process, with headers that take
longer than the kernel. Here a kernel is compiled by itself; MLX is given the machine code.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from rvc_mlx.machine import cache_folder

log = logging.getLogger("rvc_mlx")

Constant = int | bool | mx.Dtype

_TYPES = {
    mx.float32: "float",
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
    mx.int32: "int",
}
# NVRTC finds no headers unless CUDA is installed beside it; these types need none.
_PRELUDE = r"""
struct bfloat16 {
    unsigned short bits;
    bfloat16() = default;
    explicit __device__ __forceinline__ bfloat16(float v) {
#if __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
#else
        const unsigned u = __float_as_uint(v);
        bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
#endif
    }
    __device__ __forceinline__ operator float() const {
        return __uint_as_float((unsigned)bits << 16);
    }
};
struct float16 {
    unsigned short bits;
    float16() = default;
    explicit __device__ __forceinline__ float16(float v) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    }
    __device__ __forceinline__ operator float() const {
        float v;
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
        return v;
    }
};
"""
_BITS = {"int": "", "float": "_bits"}
_NAME = "KERNEL"  # in a text whose digest is to become a part of the name
_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")  # of NVIDIA's Python packages


class Grid(NamedTuple):
    """The threads of a launch.

    Attributes:
        blocks: along x.
        threads: of a block.
        rows: of blocks, along y.
        shared_memory: bytes that a block asks for at run time.
    """

    blocks: int
    threads: int
    rows: int = 1
    shared_memory: int = 0


@dataclass(frozen=True, eq=False)
class CudaKernel:
    """A kernel and what it takes.

    It equals itself only: a launch looks its code up, and must not hash a whole source.

    Attributes:
        name: of the function.
        inputs: names of the input arrays, whose values lie in order.
        outputs: names of the output arrays.
        source: the body; it sees the arrays as pointers.
        scalars: names of the numbers at run time, each with ``"int"`` or ``"float"``.
        header: what stands before the function.
        attributes: of the function, such as launch bounds.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    scalars: tuple[tuple[str, str], ...] = ()
    header: str = ""
    attributes: str = ""

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        grid: Grid,
        *,
        scalars: Sequence[float] = (),
        constants: Mapping[str, Constant] | None = None,
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: arrays, in the order of their names.
            outputs: shape and type of each output.
            grid: how many threads.
            scalars: in the order of their names.
            constants: names that the source uses; each set of them is compiled once.
            init_value: what the outputs hold before.

        Raises:
            RuntimeError: there is no NVRTC, or it refuses the source.
        """
        shapes, dtypes = zip(*outputs, strict=True)
        constants = constants or {}
        symbol, code = _function(
            self,
            tuple([a.dtype for a in inputs]),
            dtypes,
            (*constants,),
            (*constants.values(),),
            grid.shared_memory,
        )
        made: list[mx.array] = mx.fast.precompiled_cuda_kernel(
            name=symbol,
            compiled_source=code,
            inputs=list(inputs),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            scalars=self._numbers(scalars),
            grid=(grid.blocks * grid.threads, grid.rows, 1),
            threadgroup=(grid.threads, 1, 1),
            shared_memory=grid.shared_memory,
            init_value=init_value,
            ensure_row_contiguous=True,
        )
        return made

    def _numbers(self, scalars: Sequence[float]) -> list[int]:
        """Scalars as MLX is given them: floats as the bits of a float32."""
        given, whole = self._layout
        try:
            return list(whole.unpack(given.pack(*scalars)))
        except (struct.error, OverflowError):  # a float for an integer, or infinite
            return [
                int(n) if kind == "int" else int(np.float32(n).view(np.int32))
                for (_, kind), n in zip(self.scalars, scalars, strict=True)
            ]

    @cached_property
    def _layout(self) -> tuple[struct.Struct, struct.Struct]:
        kinds = "".join(kind[0] for _, kind in self.scalars)
        return struct.Struct(f"={kinds}"), struct.Struct(f"={len(kinds)}i")

    def text(
        self,
        inputs: Sequence[mx.Dtype],
        outputs: Sequence[mx.Dtype],
        constants: Sequence[tuple[str, Constant]],
    ) -> str:
        """The whole source; the function's name is ``KERNEL``."""
        arrays = [
            f"const {_TYPES[dtype]}* {name}"
            for name, dtype in zip(self.inputs, inputs, strict=True)
        ] + [
            f"{_TYPES[dtype]}* {name}"
            for name, dtype in zip(self.outputs, outputs, strict=True)
        ]
        # MLX passes whole numbers only: floats come as their bits.
        numbers = [f"int {name}{_BITS[kind]}" for name, kind in self.scalars]
        lines = [
            f"const float {name} = __int_as_float({name}{_BITS[kind]});"
            for name, kind in self.scalars
            if kind == "float"
        ] + [
            f"using {name} = {_TYPES[value]};"
            if isinstance(value, mx.Dtype)
            else f"constexpr int {name} = {int(value)};"
            for name, value in constants
        ]
        return "\n".join(
            [
                _PRELUDE + self.header,
                f'extern "C" __global__ void {self.attributes} {_NAME}(',
                "    " + ",\n    ".join(arrays + numbers) + ") {",
                *lines,
                self.source + "}",
            ]
        )


# A launch asks for this, so it is quick: names and values apart are hashed sooner than pairs.
@cache
def _function(
    kernel: CudaKernel,
    inputs: tuple[mx.Dtype, ...],
    outputs: tuple[mx.Dtype, ...],
    names: tuple[str, ...],
    values: tuple[Constant, ...],
    shared_memory: int,
) -> tuple[str, bytes]:
    """Name and machine code of a kernel with constants, for this machine's GPU."""
    # CUDA is told a function's shared memory once, so each has its own function.
    named = (*zip(names, values, strict=True), ("SHARED_MEMORY", shared_memory))
    return _compiled(kernel, inputs, outputs, named, _architecture())


def _compiled(
    kernel: CudaKernel,
    inputs: tuple[mx.Dtype, ...],
    outputs: tuple[mx.Dtype, ...],
    constants: tuple[tuple[str, Constant], ...],
    architecture: str,
) -> tuple[str, bytes]:
    """Name and machine code of a kernel, from disk where it is there."""
    text = kernel.text(inputs, outputs, constants)
    digest = hashlib.sha256(f"{architecture} {text}".encode()).hexdigest()[:16]
    symbol = f"{kernel.name}_{digest}"
    path = cache_folder() / "compiled" / "cuda" / f"{symbol}.cubin"
    with suppress(OSError, ValueError):
        return symbol, _unsealed(path.read_bytes())
    code = compile_source(text.replace(_NAME, symbol), architecture)
    partial = path.with_name(f".{symbol}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)
    except OSError as error:
        log.info("%s: not kept for the next start: %s", path, error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return symbol, code


def _unsealed(kept: bytes) -> bytes:
    """What is on disk without its digest; ValueError if it is damaged."""
    digest, code = kept[:32], kept[32:]
    if hashlib.sha256(code).digest() != digest:
        raise ValueError("the machine code is damaged")
    return code


@cache
def _architecture() -> str:
    """Of this machine's GPU, as ``"sm_80"``; of Hopper ``"sm_90a"``, for no other GPU."""
    if not mx.cuda.is_available():
        raise RuntimeError("MLX has no CUDA GPU here")
    told = mx.device_info(mx.gpu)
    major, minor = (told[f"compute_capability_{part}"] for part in ("major", "minor"))
    return f"sm_{major}{minor}{'a' if is_hopper() else ''}"


def is_hopper() -> bool:
    """Whether this machine's GPU is one, with products of warpgroups."""
    if not mx.cuda.is_available():
        return False
    told = mx.device_info(mx.gpu)
    parts = [told.get(f"compute_capability_{part}") for part in ("major", "minor")]
    return parts == [9, 0]


def compile_source(text: str, architecture: str) -> bytes:
    """Machine code of CUDA source.

    Args:
        text: C++ that includes nothing.
        architecture: as ``"sm_90"``.

    Raises:
        RuntimeError: there is no NVRTC, or it refuses the source.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    source = text.encode()
    _ask(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source,
        b"kernel.cu",
        0,
        *2 * [None],
    )
    try:
        given = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            told = _read("ProgramLog", program).decode(errors="replace").strip("\0\n")
            raise RuntimeError(f"NVRTC refuses a kernel for {architecture}: {told}")
        return _read("CUBIN", program)
    finally:
        _ask("nvrtcDestroyProgram", ctypes.byref(program))


def _read(what: str, program: ctypes.c_void_p) -> bytes:
    """What NVRTC offers as ``nvrtcGet...Size`` and ``nvrtcGet...``."""
    size = ctypes.c_size_t()
    _ask(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _ask(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _ask(function: str, *arguments: Any) -> None:
    result = getattr(_nvrtc(), function)(*arguments)
    if result:
        raise RuntimeError(f"{function} failed with NVRTC's result {result}")


@cache
def _nvrtc() -> ctypes.CDLL:
    """CUDA's compiler: the one that MLX has loaded, or one of NVIDIA's packages."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    folders = [Path(root) / folder for root in roots for folder in _FOLDERS]
    found = [
        str(path) for f in folders for n in _LIBRARIES if (path := f / n).is_file()
    ]
    for name in (*_LIBRARIES, *found):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(
        f"CUDA's compiler {' or '.join(_LIBRARIES)} was not found; install the package "
        "nvidia-cuda-nvrtc"
    )
