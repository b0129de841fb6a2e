"""Translate a traced MLX function to an OpenVINO graph.

``mx.export_function`` delivers a function as a list of events: ``inputs``,
``constants``, one ``primitive`` per operation, ``outputs``. The operation table in
``openvino_ops`` turns each primitive into OpenVINO nodes. MLX marks the exporter as
experimental, so the package pins MLX's minor version and ``test_openvino_graph.py``
checks every operation.

Three ideas carry the translation:

* **Lengths.** The function is traced at three lengths. A size that is the same in all
  of them is static; any other is dynamic and, where OpenVINO needs it as a number, an
  affine function of the input length, fitted on two traces and checked on the third.
* **Layouts.** MLX is channels-last, OpenVINO's convolutions are channels-first. A value
  carries the order in which its axes lie in memory; a transpose only changes that
  order, element-wise operations keep it, and data moves only where an operation needs
  another order.
* **Broadcasts** are not carried out: a value remembers the shape it stands for, and
  OpenVINO's element-wise operations broadcast by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import openvino as ov
import openvino.opset13 as op

Sizes = tuple[int, ...]  # one size of an axis, in each trace

# Primitives whose arguments hold sizes; those of all others must not vary.
_SIZED = {
    "Arange",
    "Broadcast",
    "Flatten",
    "Full",
    "Pad",
    "Reshape",
    "Slice",
    "Unflatten",
}

# Primitives that pass on, or know how to use, a constant that depends on the length.
_TAKES_LENGTHS = {"Broadcast", "Multiply"}

_TYPES = {
    mx.float32: ov.Type.f32,
    mx.int32: ov.Type.i32,
    mx.int64: ov.Type.i64,
    mx.uint32: ov.Type.u32,
    mx.bool_: ov.Type.boolean,
}


def is_static(size: Sizes) -> bool:
    """Whether an axis has the same size in every trace."""
    return len(set(size)) == 1


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, spoken of in MLX's axes.

    Attributes:
        node: the OpenVINO output that holds it.
        shape: its size along each axis, in each trace.
        order: the axes in the order in which ``node`` has them.
        held: as ``shape``, with 1 where the axis is only broadcast later.
        made: how it was made, where a later operation can join in: a name and the
            operands (a mean from a sum, attention from its two products).
        scalar: the number that it is, in each trace.
    """

    node: Any
    shape: tuple[Sizes, ...]
    order: tuple[int, ...]
    held: tuple[Sizes, ...]
    made: tuple[str, tuple[Any, ...]] | None = None
    scalar: tuple[float, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def position(self, axis: int) -> int:
        """Where ``axis`` lies in ``node``."""
        return self.order.index(axis)


def constant(values: Any, dtype: Any = np.int64) -> Any:
    """An OpenVINO constant; int64 unless told otherwise, as shapes and axes want it."""
    return op.constant(np.asarray(values, dtype))


def is_constant(node: Any) -> bool:
    """Whether a node is a constant, whose data can be rearranged here and now."""
    return hasattr(node, "get_type_name") and node.get_type_name() == "Constant"


def plain(node: Any, shape: Sequence[Sizes]) -> Value:
    """A value in MLX's own axis order, fully held."""
    shape = tuple(shape)
    return Value(node, shape, tuple(range(len(shape))), shape)


def arranged(value: Value, order: Sequence[int]) -> Any:
    """The node of ``value`` with its axes in ``order``."""
    permutation = [value.position(axis) for axis in order]
    if permutation == list(range(value.rank)):
        return value.node
    if is_constant(value.node):
        return op.constant(np.transpose(value.node.data, permutation))
    moving = [p for p in permutation if value.held[value.order[p]] != _ones(value)]
    if moving == sorted(moving):  # only axes of length 1 move: no data does
        sizes = [value.held[axis] for axis in order]
        if sum(not is_static(size) for size in sizes) <= 1:
            target = [size[0] if is_static(size) else -1 for size in sizes]
            return op.reshape(value.node, constant(target), False)
    return op.transpose(value.node, constant(permutation))


def _ones(value: Value) -> Sizes:
    return (1,) * len(value.shape[0]) if value.shape else (1,)


class Translator:
    """Turns the events of one function into nodes; see the module's docstring."""

    def __init__(self, lengths: Sizes, length_node: Any):
        self.lengths = lengths
        self._length_node = length_node
        self.values: dict[str, Value] = {}

    def _line(self, size: Sizes) -> tuple[Fraction, Fraction]:
        """Slope and start of the line through a size in the first two traces."""
        slope = Fraction(size[1] - size[0], self.lengths[1] - self.lengths[0])
        return slope, size[0] - slope * self.lengths[0]

    def is_affine(self, size: Sizes) -> bool:
        """Whether the third trace lies on the line through the first two."""
        slope, start = self._line(size)
        return start + slope * self.lengths[2] == size[2]

    def size_node(self, size: Sizes) -> Any:
        """A size as an int64 node ``[1]``, computed from the input length."""
        if is_static(size):
            return constant([size[0]])
        if not self.is_affine(size):
            raise NotImplementedError(
                f"the size {size} is not an affine function of the length {self.lengths}"
            )
        slope, start = self._line(size)
        scale = math.lcm(slope.denominator, start.denominator)
        node = op.multiply(self._length_node, constant([int(slope * scale)]))
        node = op.add(node, constant([int(start * scale)]))
        return op.divide(node, constant([scale])) if scale != 1 else node

    def sizes_node(self, sizes: Sequence[Sizes]) -> Any:
        """Sizes as one int64 node ``[len(sizes)]``."""
        if all(is_static(size) for size in sizes):
            return constant([size[0] for size in sizes])
        return op.concat([self.size_node(size) for size in sizes], 0)

    def constant(self, arrays: Sequence[np.ndarray]) -> Value:
        """A constant, from what it is in each trace.

        One that differs between traces has no node: it can only turn a sum into a mean.
        """
        same = all(np.array_equal(arrays[0], array) for array in arrays[1:])
        if not same and any(array.ndim for array in arrays):
            raise ValueError("a constant of the function depends on the input's length")
        shape = _merged([arrays[0].shape] * len(arrays)) if arrays[0].shape else ()
        value = plain(op.constant(arrays[0]) if same else None, shape)
        if not shape:
            value = replace(value, scalar=tuple(float(array) for array in arrays))
        return value

    def dense(self, value: Value) -> Value:
        """Carry out a pending broadcast."""
        if value.held == value.shape:
            return value
        target = self.sizes_node([value.shape[axis] for axis in value.order])
        return replace(value, node=op.broadcast(value.node, target), held=value.shape)

    def reshape(self, value: Value, shape: Sequence[Sizes]) -> Value:
        """Split, merge, insert and remove axes, moving data only where they interleave."""
        shape = tuple(shape)
        groups = _match_axes(value.shape, shape)
        if any(len(_real(value.shape, g[0])) > 1 or len(g[1]) > 1 for g in groups):
            value = self.dense(value)
        if not all(_adjacent(source, value.order) for source, _ in groups):
            identity = tuple(range(value.rank))
            value = replace(value, node=arranged(value, identity), order=identity)
        order: list[int] = []
        for axis in value.order:
            for source, target in groups:
                if source and axis == source[0]:
                    order += target
        order += [axis for source, target in groups if not source for axis in target]
        held = list(shape)
        for source, target in groups:
            if len(source) == len(target) == 1:
                held[target[0]] = value.held[source[0]]
        node = op.reshape(
            value.node, self.pattern([held[axis] for axis in order]), False
        )
        return Value(node, shape, tuple(order), tuple(held))

    def pattern(self, sizes: Sequence[Sizes]) -> Any:
        """Target of a reshape; one unknown size is left to OpenVINO."""
        dynamic = [not is_static(size) for size in sizes]
        if sum(dynamic) == 1:
            return constant(
                [-1 if d else s[0] for d, s in zip(dynamic, sizes, strict=True)]
            )
        return self.sizes_node(sizes)


def _real(shape: Sequence[Sizes], axes: Sequence[int]) -> list[int]:
    return [axis for axis in axes if set(shape[axis]) != {1}]


def _adjacent(axes: Sequence[int], order: Sequence[int]) -> bool:
    places = [order.index(axis) for axis in axes]
    return places == list(range(places[0], places[0] + len(places))) if places else True


def _product(sizes: Sequence[Sizes], traces: int) -> Sizes:
    return tuple(math.prod(size[t] for size in sizes) for t in range(traces))


def _match_axes(
    source: Sequence[Sizes], target: Sequence[Sizes]
) -> list[tuple[list[int], list[int]]]:
    """Pair the axes of two shapes of equal size into the smallest groups that agree."""
    traces = len((*source, *target)[0]) if (*source, *target) else 1
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        a, b = ([i], [j]) if i < len(source) and j < len(target) else ([], [])
        if not a:  # what is left on one side has length 1
            groups.append(([i], []) if i < len(source) else ([], [j]))
            i, j = i + (i < len(source)), j + (j < len(target) and i >= len(source))
            continue
        if source[i] != target[j] and set(target[j]) == {1}:
            groups.append(([], [j]))
            j += 1
            continue
        if source[i] != target[j] and set(source[i]) == {1}:
            groups.append(([i], []))
            i += 1
            continue
        while True:
            left = _product([source[k] for k in a], traces)
            right = _product([target[k] for k in b], traces)
            if left == right:
                break
            if left < right:
                a.append(a[-1] + 1)
            else:
                b.append(b[-1] + 1)
        groups.append((a, b))
        i, j = a[-1] + 1, b[-1] + 1
    return groups


def _trace(fn: Callable[..., Any], example: Sequence[mx.array]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    with mx.stream(mx.cpu):
        mx.export_function(events.append, fn, *example)
    return events


def _merged(shapes: Sequence[Sequence[int]]) -> tuple[Sizes, ...]:
    return tuple(zip(*shapes, strict=True))


def parameter(sizes: Sequence[Sizes], dtype: mx.Dtype) -> Any:
    """A graph input; axes whose size differs between the examples are dynamic."""
    dims = [size[0] if is_static(size) else -1 for size in sizes]
    return op.parameter(dims, _TYPES[dtype])


def translate(
    fn: Callable[..., Any],
    examples: Sequence[Sequence[mx.array]],
    inputs: Sequence[Any] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Translate a pure MLX function of arrays.

    Args:
        fn: the function; its parameters must be evaluated, or their random
            initialisers become part of the graph.
        examples: its arguments at one length (all static) or at three lengths.
        inputs: nodes to read instead of new parameters, in MLX's axis order.

    Returns:
        The input nodes and the output nodes, in MLX's axis order.

    Raises:
        NotImplementedError: a primitive is not in the table; names it.
        ValueError: the examples do not trace to the same operations.
    """
    from rvc_mlx.openvino_ops import OPERATIONS

    traces = [_trace(fn, example) for example in examples]
    names = {tuple(event.get("name", "") for event in trace) for trace in traces}
    if len(names) != 1:
        raise ValueError("the function traces to other operations at other lengths")
    shapes = [_merged([e[i].shape for e in examples]) for i in range(len(examples[0]))]
    if inputs is None:
        inputs = [
            parameter(s, a.dtype) for s, a in zip(shapes, examples[0], strict=True)
        ]
    translator = _prepare(inputs, shapes)
    outputs: list[str] = []
    for events in zip(*traces, strict=True):
        event = events[0]
        if event["type"] == "inputs":
            for (name, *_), node, shape in zip(
                event["inputs"], inputs, shapes, strict=True
            ):
                translator.values[name] = plain(node, shape)
        elif event["type"] == "constants":
            for entries in zip(*(e["constants"] for e in events), strict=True):
                arrays = [np.array(array) for _, array in entries]
                translator.values[entries[0][0]] = translator.constant(arrays)
        elif event["type"] == "outputs":
            outputs = [name for name, *_ in event["outputs"]]
        elif event["type"] == "primitive":
            _translate_primitive(translator, events, OPERATIONS)
    values = [translator.dense(translator.values[name]) for name in outputs]
    return list(inputs), [arranged(v, range(v.rank)) for v in values]


def _prepare(inputs: Sequence[Any], shapes: Sequence[tuple[Sizes, ...]]) -> Translator:
    """A translator that reads the length off the first input axis that varies."""
    for node, shape in zip(inputs, shapes, strict=True):
        for axis, size in enumerate(shape):
            if not is_static(size):
                where = constant([axis])
                length = op.gather(op.shape_of(node), where, constant(0))
                return Translator(size, length)
    return Translator((1,), None)


def _translate_primitive(
    translator: Translator, events: Sequence[dict[str, Any]], table: dict[str, Any]
) -> None:
    from rvc_mlx.openvino_fusions import join_chain

    event = events[0]
    name = event["name"]
    inputs = [translator.values[i[0]] for i in event["inputs"]]
    if name not in table:
        raise NotImplementedError(
            f"the MLX primitive {name}{event['arguments']} on "
            f"{[i[1:] for i in event['inputs']]} has no OpenVINO translation"
        )
    if any(v.node is None for v in inputs) and name not in _TAKES_LENGTHS:
        raise ValueError(f"{name} reads a constant that depends on the input's length")
    if name not in _SIZED and any(e["arguments"] != event["arguments"] for e in events):
        raise ValueError(f"{name} depends on the length: {event['arguments']}")
    shapes = [
        _merged([e["outputs"][k][1] for e in events])
        for k in range(len(event["outputs"]))
    ]
    call = Call(
        translator,
        inputs,
        [e["arguments"] for e in events],
        shapes,
        event["outputs"][0][2],
    )
    results = table[name](call)
    if not isinstance(results, list):
        results = [join_chain(name, call, results)]
    for output, value in zip(event["outputs"], results, strict=True):
        translator.values[output[0]] = value


@dataclass(frozen=True)
class Call:
    """One primitive with everything its translation needs.

    Attributes:
        translator: the graph it goes into.
        inputs: its inputs.
        arguments: its arguments, in each trace.
        shapes: the shape of each output.
        dtype: MLX type of the first output.
    """

    translator: Translator
    inputs: list[Value]
    arguments: list[list[Any]]
    shapes: list[tuple[Sizes, ...]]
    dtype: mx.Dtype

    @property
    def type(self) -> ov.Type:
        """OpenVINO type of the first output."""
        return _TYPES[self.dtype]
