"""Chains of primitives that are one operation in OpenVINO: GELU, layer norm.

MLX traces them as their formulas, and OpenVINO does not recognise these spellings. Each
value remembers how far along a chain it is (``Value.made``); the last link replaces
the whole chain. Nodes that nothing reads any more are not part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import openvino.opset13 as op

from rvc_mlx.openvino_graph import Call, Value, arranged, constant

Link = Callable[[Value, Value, Value], "Value | None"]


def join_chain(name: str, call: Call, result: Value) -> Value:
    """The result of a primitive, marked as a link of a chain or as the end of one."""
    if name == "Sqrt" and call.arguments[0][0]:
        name = "Reciprocal Sqrt"
    for link in _LINKS.get(name, ()):
        first, second = (call.inputs * 2)[:2]
        swapped = [] if name in _ORDERED else [(second, first)]
        for a, b in [(first, second), *swapped]:
            if (joined := link(result, a, b)) is not None:
                return joined
    return result


def _is(value: Value, number: float) -> bool:
    return value.scalar is not None and np.allclose(value.scalar, number, atol=1e-6)


def _made(value: Value, kind: str) -> tuple | None:
    return value.made[1] if value.made and value.made[0] == kind else None


def _step(kind: str, before: str, number: float | None = None) -> Link:
    """A link that follows ``before``, with ``number`` as the other operand."""

    def link(result: Value, a: Value, b: Value) -> Value | None:
        operands = _made(a, before)
        if operands is None or not (number is None or _is(b, number)):
            return None
        return replace(result, made=(kind, operands))

    return link


# GELU: x (1 + erf(x / sqrt 2)) / 2


def _gelu_start(result: Value, a: Value, b: Value) -> Value | None:
    return replace(result, made=("x/sqrt2", (a,))) if _is(b, math.sqrt(2)) else None


def _gelu_product(result: Value, a: Value, b: Value) -> Value | None:
    operands = _made(b, "1+erf")
    if operands is None or a.node is not operands[0].node:
        return None
    return replace(result, made=("2 gelu", operands))


def _gelu_end(result: Value, a: Value, b: Value) -> Value | None:
    operands = _made(a, "2 gelu")
    if operands is None or not _is(b, 2):
        return None
    (x,) = operands
    return replace(x, node=op.gelu(x.node, "ERF"), shape=result.shape, made=None)


# Normalisation: the centred input over the root of its variance plus eps


def _centred(result: Value, a: Value, b: Value) -> Value | None:
    operands = _made(b, "mean")
    if operands is None or a.node is not operands[0].node:
        return None
    return replace(result, made=("centred", operands))


def _offset_variance(result: Value, a: Value, b: Value) -> Value | None:
    operands = _made(a, "mean")
    if operands is None or b.scalar is None:
        return None
    square, places = operands
    centred = _made(square, "centred square")
    if centred is None or list(centred[1].data) != list(places.data):
        return None
    return replace(result, made=("variance", (*centred, b.scalar[0])))


def _normalized(result: Value, a: Value, b: Value) -> Value | None:
    centred, deviation = _made(a, "centred"), _made(b, "1/deviation")
    if centred is None or deviation is None:
        return None
    x, places, eps = deviation
    same_axes = list(centred[1].data) == list(places.data)
    if x.node is not centred[0].node or not same_axes:
        return None
    # OpenVINO has a kernel for trailing axes only; the others lead in MLX's order.
    axes = sorted(x.order[place] for place in places.data)
    order = (*(axis for axis in range(x.rank) if axis not in axes), *axes)
    last = constant(list(range(x.rank - len(axes), x.rank)))
    node = op.mvn(arranged(x, order), last, True, eps, "INSIDE_SQRT")
    return Value(node, result.shape, order, x.held)


_LINKS: dict[str, tuple[Link, ...]] = {
    "Divide": (_gelu_start, _gelu_end),
    "Erf": (_step("erf", "x/sqrt2"),),
    "Add": (_step("1+erf", "erf", 1), _offset_variance),
    "Multiply": (_gelu_product, _normalized),
    "Subtract": (_centred,),
    "Square": (_step("centred square", "centred"),),
    "Reciprocal Sqrt": (_step("1/deviation", "variance"),),
}
_ORDERED = {"Divide", "Subtract"}  # operands cannot change places
