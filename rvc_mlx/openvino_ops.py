"""The operation table: one small function per MLX primitive, registered by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import openvino.opset13 as op

from rvc_mlx.openvino_graph import (
    Call,
    Sizes,
    Value,
    arranged,
    constant,
    is_constant,
    is_static,
    plain,
)

Operation = Callable[[Call], "Value | list[Value]"]
OPERATIONS: dict[str, Operation] = {}

_END = 2**63 - 1  # a slice end that means "to the end"
_REPLACE = 1  # the kind of MLX's ScatterAxis that ``put_along_axis`` is


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register the translation of the primitive ``name``."""

    def register(function: Operation) -> Operation:
        if name in OPERATIONS:
            raise ValueError(f"{name} is registered twice")
        OPERATIONS[name] = function
        return function

    return register


# Element-wise.


def _weight(value: Value) -> int:
    return math.prod(size[0] for size in value.held)


def elementwise(call: Call, make: Callable[..., Any]) -> Value:
    """Apply ``make`` to inputs brought to the axis order of the largest."""
    order = max(call.inputs, key=_weight).order
    nodes = [arranged(value, order) for value in call.inputs]
    held = tuple(
        max((value.held[axis] for value in call.inputs), key=lambda size: size[0])
        for axis in range(len(order))
    )
    return Value(make(*nodes), call.shapes[0], order, held)


_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": op.abs,
    "Cos": op.cos,
    "Erf": op.erf,
    "Exp": op.exp,
    "Floor": op.floor,
    "Log": op.log,
    "Negative": op.negative,
    "Sigmoid": op.sigmoid,
    "Sin": op.sin,
    "Square": lambda x: op.power(x, constant(2, np.float32)),
    "Tanh": op.tanh,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "Add": op.add,
    "Subtract": op.subtract,
    "Divide": op.divide,
    "Maximum": op.maximum,
    "Minimum": op.minimum,
    "Power": op.power,
    "Equal": op.equal,
    "Greater": op.greater,
    "GreaterEqual": op.greater_equal,
    "Less": op.less,
    "Select": op.select,
}
for _name, _make in (_UNARY | _BINARY).items():
    operation(_name)(partial(elementwise, make=_make))


@operation("Multiply")
def _multiply(call: Call) -> Value:
    """A product; a sum times one over its count becomes a mean, which OpenVINO fuses."""
    for value, factor in (call.inputs, call.inputs[::-1]):
        if value.made and value.made[0] == "sum" and factor.scalar:
            x, places, count = value.made[1]
            if np.allclose(np.multiply(factor.scalar, count), 1, atol=1e-6):
                node = op.reduce_mean(x.node, places, True)
                if value.rank < x.rank:
                    kept = [value.held[axis] for axis in value.order]
                    node = op.reshape(node, call.translator.pattern(kept), False)
                    return replace(value, node=node, made=None)
                return replace(value, node=node, made=("mean", (x, places)))
    if any(value.node is None for value in call.inputs):
        raise ValueError("Multiply by a constant that depends on the input's length")
    return elementwise(call, op.multiply)


@operation("Sqrt")
def _sqrt(call: Call) -> Value:
    if call.arguments[0][0]:  # reciprocal
        return elementwise(call, lambda x: op.power(x, constant(-0.5, np.float32)))
    return elementwise(call, op.sqrt)


@operation("AsType")
def _as_type(call: Call) -> Value:
    return elementwise(call, lambda x: op.convert(x, call.type))


@operation("Arange")
def _arange(call: Call) -> Value:
    starts, stops, steps = zip(*call.arguments, strict=True)
    if is_static(stops):
        values = np.arange(starts[0], stops[0], steps[0], dtype=np.float64)
        return plain(op.convert(op.constant(values), call.type), call.shapes[0])
    if any(set(value) != {value[0]} or value[0] % 1 for value in (starts, steps)):
        raise NotImplementedError(f"Arange{call.arguments}; only its end may vary")
    stop = call.translator.size_node(tuple(int(stop) for stop in stops))
    node = op.range(
        constant(int(starts[0])),
        op.squeeze(stop, constant([0])),
        constant(int(steps[0])),
        "i64",
    )
    return plain(op.convert(node, call.type), call.shapes[0])


@operation("Full")
def _full(call: Call) -> Value:
    return call.inputs[0]


# Shape.


@operation("Broadcast")
def _broadcast(call: Call) -> Value:
    value, shape = call.inputs[0], call.shapes[0]
    one = (1,) * len(call.arguments)
    new = len(shape) - value.rank
    if new:
        ranked = (one,) * new + value.shape
        held = (one,) * new + value.held
        order = (*range(new), *(axis + new for axis in value.order))
        axes = constant(list(range(new)))
        node = value.node
        if is_constant(node):  # a literal, so that OpenVINO's fusions recognise it
            node = op.constant(node.data.reshape((1,) * new + node.data.shape))
        elif node is not None:
            node = op.unsqueeze(node, axes)
        value = Value(node, ranked, order, held, scalar=value.scalar)
    return replace(value, shape=shape, made=None if new else value.made)


@operation("Transpose")
def _transpose(call: Call) -> Value:
    value, axes = call.inputs[0], list(call.arguments[0][0])
    return Value(
        value.node,
        call.shapes[0],
        tuple(axes.index(axis) for axis in value.order),
        tuple(value.held[axis] for axis in axes),
    )


def _reshape(call: Call) -> Value:
    return call.translator.reshape(call.inputs[0], call.shapes[0])


for _name in ("Reshape", "Flatten", "Unflatten", "ExpandDims"):
    operation(_name)(_reshape)


@operation("Squeeze")
def _squeeze(call: Call) -> Value:
    made = call.inputs[0].made  # a sum may still become a mean
    return replace(_reshape(call), made=made if made and made[0] == "sum" else None)


@operation("Concatenate")
def _concatenate(call: Call) -> Value:
    axis = call.arguments[0][0]
    values = [call.translator.dense(value) for value in call.inputs]
    order = max(values, key=_weight).order
    node = op.concat([arranged(v, order) for v in values], order.index(axis))
    return Value(node, call.shapes[0], order, call.shapes[0])


@operation("Split")
def _split(call: Call) -> list[Value]:
    axis = call.arguments[0][1]
    value = call.translator.dense(call.inputs[0])
    lengths = [shape[axis][0] for shape in call.shapes]
    nodes = op.variadic_split(
        value.node, constant(value.position(axis)), constant(lengths)
    ).outputs()
    return [
        Value(node, shape, value.order, shape)
        for node, shape in zip(nodes, call.shapes, strict=True)
    ]


def _bound(call: Call, size: Sizes, at: Sizes) -> Any:
    """Start or stop of a slice, counted from the end where only that is constant."""
    at = tuple(t + s if t < 0 else t for s, t in zip(size, at, strict=True))
    if set(at) == {-1}:  # going down, past the first element
        return constant([-_END])
    if is_static(at):
        return constant([at[0]])
    behind = tuple(t - s for s, t in zip(size, at, strict=True))
    if is_static(behind):
        return constant([behind[0] or _END])
    translator = call.translator
    return translator.size_node(at if translator.is_affine(at) else behind)


@operation("Slice")
def _slice(call: Call) -> Value:
    value = call.translator.dense(call.inputs[0])
    starts, ends = (zip(*(a[k] for a in call.arguments), strict=True) for k in (0, 1))
    steps = call.arguments[0][2]
    node = value.node
    for axis, (start, end, step) in enumerate(zip(starts, ends, steps, strict=True)):
        size = value.shape[axis]
        place = constant([value.position(axis)])
        if call.shapes[0][axis] == size and step == 1:
            continue
        if step < 0 and is_static(size) and is_static(start) and is_static(end):
            kept = range(size[0])[start[0] : end[0] : step]
            node = op.gather(node, constant([*kept]), constant(value.position(axis)))
            continue
        first, last = (_bound(call, size, at) for at in (start, end))
        node = op.slice(node, first, last, constant([step]), place)
    return Value(node, call.shapes[0], value.order, call.shapes[0])


@operation("Pad")
def _pad(call: Call) -> Value:
    value = call.translator.dense(call.inputs[0])
    axes = list(call.arguments[0][0])
    amounts = []
    for k in (1, 2):
        per_axis = list(zip(*(a[k] for a in call.arguments), strict=True))
        none = (0,) * len(call.arguments)
        amounts.append(
            call.translator.sizes_node(
                [per_axis[axes.index(a)] if a in axes else none for a in value.order]
            )
        )
    node = op.pad(value.node, *amounts, "constant", call.inputs[1].node)
    return Value(node, call.shapes[0], value.order, call.shapes[0])


@operation("Gather")
def _gather(call: Call) -> Value:
    axes, sizes = call.arguments[0]
    table, index = call.inputs
    if list(axes) != [0] or sizes[0] != 1:
        raise NotImplementedError(f"Gather along {axes} of slices {sizes}")
    index = call.translator.dense(index)
    rows = op.gather(
        arranged(table, range(table.rank)),
        arranged(index, range(index.rank)),
        constant(0),
    )
    gathered = plain(rows, (*index.shape, *table.shape[1:]))
    return call.translator.reshape(gathered, call.shapes[0])


def _along_axis(call: Call, values: list[Value]) -> list[Any]:
    """Values of equal size in all axes but one, in MLX's axis order."""
    dense = [call.translator.dense(value) for value in values]
    return [arranged(value, range(value.rank)) for value in dense]


@operation("GatherAxis")
def _gather_axis(call: Call) -> Value:
    data, index = _along_axis(call, call.inputs)
    axis = call.arguments[0][0]
    return plain(op.gather_elements(data, index, axis), call.shapes[0])


@operation("ScatterAxis")
def _scatter_axis(call: Call) -> Value:
    reduction, axis = call.arguments[0]
    if reduction != _REPLACE:
        raise NotImplementedError(f"ScatterAxis of kind {reduction}; only replacing")
    data, index, updates = _along_axis(call, call.inputs)
    node = op.scatter_elements_update(data, index, updates, constant(axis))
    return plain(node, call.shapes[0])


# Along an axis.


_REDUCTIONS = {2: op.reduce_sum, 3: op.reduce_prod, 4: op.reduce_min, 5: op.reduce_max}


@operation("Reduce")
def _reduce(call: Call) -> Value:
    kind, axes = call.arguments[0]
    if kind not in _REDUCTIONS:
        raise NotImplementedError(f"Reduce of kind {kind}; known are {[*_REDUCTIONS]}")
    value = call.translator.dense(call.inputs[0])
    places = constant([value.position(axis) for axis in axes])
    result = Value(
        _REDUCTIONS[kind](value.node, places, True),
        call.shapes[0],
        value.order,
        call.shapes[0],
    )
    if _REDUCTIONS[kind] is not op.reduce_sum:
        return result
    sizes = [value.shape[axis] for axis in axes]
    count = [math.prod(size[t] for size in sizes) for t in range(len(call.arguments))]
    return replace(result, made=("sum", (value, places, count)))


@operation("Scan")
def _scan(call: Call) -> Value:
    kind, axis, reverse, inclusive = call.arguments[0]
    if kind != 2:
        raise NotImplementedError(f"Scan of kind {kind}; only the sum is known")
    value = call.translator.dense(call.inputs[0])
    place = constant(value.position(axis))
    node = op.cumsum(value.node, place, exclusive=not inclusive, reverse=reverse)
    return Value(node, call.shapes[0], value.order, call.shapes[0])


@operation("Softmax")
def _softmax(call: Call) -> Value:
    value = call.translator.dense(call.inputs[0])
    node = op.softmax(value.node, value.position(value.rank - 1))
    result = Value(node, call.shapes[0], value.order, call.shapes[0])
    if value.made and value.made[0] == "product":
        return replace(result, made=("attention", value.made[1]))
    return result


# Products.


def _matrix(value: Value) -> tuple[Any, bool]:
    """A node for a matrix product, and whether its last two axes are swapped."""
    axes = list(range(value.rank))
    swapped = [*axes[:-2], axes[-1], axes[-2]]
    if list(value.order) == swapped:
        return value.node, True
    return arranged(value, axes), False


def _factors(call: Call) -> tuple[Value, Value]:
    """The two factors, without broadcasts that their product would not carry out."""
    left, right = call.inputs[:2]
    if left.held[-2:] != left.shape[-2:] or any(
        a == b != size
        for a, b, size in zip(left.held[:-2], right.held[:-2], left.shape, strict=False)
    ):
        left = call.translator.dense(left)
    if right.held[-2:] != right.shape[-2:]:
        right = call.translator.dense(right)
    return left, right


def _product(call: Call) -> Value:
    left, right = _factors(call)
    if left.made and left.made[0] == "attention" and left.rank > 2:
        return _attention(call, left, right)
    (a, a_swapped), (b, b_swapped) = _matrix(left), _matrix(right)
    result = plain(op.matmul(a, b, a_swapped, b_swapped), call.shapes[0])
    return replace(result, made=("product", (left, right)))


def _attention(call: Call, weights: Value, value: Value) -> Value:
    """softmax(q k) v as one operation, which never holds the square of scores."""
    assert weights.made
    query, key = weights.made[1]  # the key has its last two axes swapped
    query, key, value = (call.translator.dense(v) for v in (query, key, value))
    axes = list(range(query.rank))
    node = op.scaled_dot_product_attention(
        arranged(query, axes),
        arranged(key, [*axes[:-2], axes[-1], axes[-2]]),
        arranged(value, axes),
        scale=constant(1, np.float32),
        attention_mask=constant(0, np.float32),
    )
    return plain(node, call.shapes[0])


operation("Matmul")(_product)


@operation("AddMM")
def _addmm(call: Call) -> Value:
    alpha, beta = call.arguments[0]
    if (alpha, beta) != (1.0, 1.0):
        raise NotImplementedError(f"AddMM with alpha {alpha} and beta {beta}")
    inputs = [_product(call), call.inputs[2]]
    return elementwise(replace(call, inputs=inputs), op.add)


@operation("Convolution")
def _convolution(call: Call) -> Value:
    stride, low, high, dilation, input_dilation, groups, flip = call.arguments[0]
    n = len(stride)
    value, weight = (call.translator.dense(v) for v in call.inputs)
    order = (0, n + 1, *range(1, n + 1))
    x = arranged(value, order)
    if flip or any(d != 1 for d in input_dilation):
        kernel = [size[0] for size in weight.shape[1:-1]]
        pads = [k - 1 - p for k, p in zip(kernel, low, strict=True)]
        if not flip or groups != 1 or min(pads) < 0 or {*stride, *dilation} != {1}:
            raise NotImplementedError(
                f"Convolution{call.arguments[0]}; with a flipped kernel or a dilated "
                "input only plain transposed convolutions are known"
            )
        node = op.convolution_backprop_data(
            x,
            arranged(weight, (n + 1, 0, *range(1, n + 1))),
            list(input_dilation),
            pads_begin=pads,
            pads_end=pads,
            dilations=[1] * n,
            output_padding=[h - p for h, p in zip(high, low, strict=True)],
        )
    else:
        w = arranged(weight, order)
        args: Sequence[Any] = [list(stride), list(low), list(high), list(dilation)]
        if groups == 1:
            node = op.convolution(x, w, *args)
        else:
            c_out, *kernel, c_in = (size[0] for size in weight.shape)
            shape = constant([groups, c_out // groups, c_in, *kernel])
            node = op.group_convolution(x, op.reshape(w, shape, False), *args)
    return Value(node, call.shapes[0], order, call.shapes[0])


def gru_sequence(x: Any, weights: Sequence[np.ndarray], hidden_size: int) -> Any:
    """One bidirectional GRU layer as a single OpenVINO operation.

    Args:
        x: node ``[1, T, C]``.
        weights: torch's ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``, each
            with both directions stacked on a new first axis; gates r, z, n.
        hidden_size: units in each direction.

    Returns:
        Node ``[1, T, 2 * hidden_size]``, forward half first.
    """

    def z_first(a: np.ndarray) -> np.ndarray:  # OpenVINO stacks z, r, n
        r, z, n = np.split(a, 3, axis=1)
        return np.concatenate([z, r, n], axis=1)

    w_ih, w_hh, b_ih, b_hh = (z_first(np.asarray(a, np.float32)) for a in weights)
    # z and r take the sum of the biases; the candidate keeps them apart.
    both = b_ih + b_hh
    size = hidden_size
    bias = np.concatenate(
        [both[:, : 2 * size], b_ih[:, 2 * size :], b_hh[:, 2 * size :]], axis=1
    )
    length = op.gather(op.shape_of(x), constant([1]), constant(0))
    sequence = op.gru_sequence(
        x,
        op.constant(np.zeros((1, 2, hidden_size), np.float32)),
        length,
        op.constant(w_ih),
        op.constant(w_hh),
        op.constant(bias.astype(np.float32)),
        hidden_size,
        "bidirectional",
        linear_before_reset=True,
    )
    states = op.transpose(sequence.output(0), constant([0, 2, 1, 3]))
    return op.reshape(states, constant([1, -1, 2 * hidden_size]), False)
