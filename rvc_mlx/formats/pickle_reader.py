"""A reader of pickles that can build plain data and nothing else.

A pickle is a program for a small stack machine, and Python's own reader imports and
calls whatever that program names. This one runs the program itself: it knows the
opcodes of the binary protocols (2 to 5), makes numbers, strings, lists, tuples and
dicts, and calls only what an exact table of (module, name) pairs offers. Every other
name becomes a `Foreign` record, which is never imported, accepts any arguments and
keeps none. No ``pickle`` module, no hashing of nested keys, no recursion: what a file
can cost is bounded by its own size and by the limits below.

Sets become lists and dict keys become strings, as they would in JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from rvc_mlx.formats.pickle_stack import PickleStack
from rvc_mlx.formats.pickle_values import MAX_NAME_LENGTH, Builder, Foreign, Record

MAX_FOREIGN = 2_000
_STOP = ord(".")


class PickleReader(PickleStack):
    """Reads one or more pickles from a file's bytes.

    Args:
        data: the bytes, as an unsigned 8-bit view.
        names: the allow-list: (module, name) to a `Builder` or to plain data.
        load_persistent: makes the object for a persistent id; without it such ids
            are refused.
    """

    def __init__(
        self,
        data: memoryview,
        names: Mapping[tuple[str, str], object],
        load_persistent: Callable[[object], object] | None = None,
    ):
        super().__init__(data)
        self._names = names
        self._load_persistent = load_persistent
        self._foreign: dict[str, Foreign] = {}

    @property
    def foreign(self) -> tuple[str, ...]:
        """Names outside the allow-list that were met, in order."""
        return tuple(self._foreign)

    def load(self, start: int = 0) -> object:
        """The object pickled at byte ``start``; leaves `position` behind its end.

        Raises:
            ValueError: the pickle is damaged, exceeds a limit or asks for something
                that is not plain data.
        """
        self.position = start
        self._stack, self._marked, self._memo = [], [], {}
        while (opcode := self._next_opcode()) != _STOP:
            step = _STEPS.get(opcode)
            if step is None:
                raise ValueError(self._unsupported(opcode))
            step(self)
        return self._pop()

    def foreign_class(self, name: str) -> Foreign:
        """The record that stands for a name outside the allow-list."""
        if name not in self._foreign:
            if len(self._foreign) >= MAX_FOREIGN:
                raise ValueError(f"the pickle names more than {MAX_FOREIGN} classes")
            self._foreign[name] = Foreign(name)
        return self._foreign[name]

    def _push_persistent(self) -> None:
        identifier = self._pop()
        if self._load_persistent is None:
            raise ValueError("the pickle refers to data that is not in the file")
        self._push(self._load_persistent(identifier))

    # Names and calls

    def _find(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the pickle is damaged: a class name is not text")
        if len(module) > MAX_NAME_LENGTH or len(name) > MAX_NAME_LENGTH:
            raise ValueError("the pickle names a class with an overlong name")
        if "." in name:
            raise ValueError(
                f"the pickle reaches into {module} for {name!r}; attributes of "
                "classes and functions are not looked up"
            )
        known = self._names.get((module, name))
        return self.foreign_class(f"{module}.{name}") if known is None else known

    def _find_on_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._push(self._find(module, name))

    def _call(self, target: object, arguments: object) -> None:
        if isinstance(target, Foreign):
            self._push(target)
        elif isinstance(target, Builder) and isinstance(arguments, tuple):
            self._push(target.build(arguments, self))
        else:
            raise ValueError(f"the pickle calls a {type(target).__name__}")

    def _reduce(self) -> None:
        arguments, target = self._pop(), self._pop()
        self._call(target, arguments)

    def _new_with_keywords(self) -> None:
        keywords, arguments, target = self._pop(), self._pop(), self._pop()
        if keywords and not isinstance(target, Foreign):
            raise ValueError("the pickle calls a function with named arguments")
        self._call(target, arguments)

    def _instance(self) -> None:
        target = self._find(self._line(), self._line())
        self._call(target, tuple(self._pop_marked()))

    def _object(self) -> None:
        items = self._pop_marked()
        if not items:
            raise ValueError("the pickle is damaged: an object has no class")
        self._call(items[0], tuple(items[1:]))

    def _build(self) -> None:
        state, target = self._pop(), self._peek()
        if isinstance(target, Record):
            target.set_state(state)
        elif not isinstance(target, (Foreign, dict)):  # a dict's own state is unused
            raise ValueError(f"the pickle sets the state of a {type(target).__name__}")

    def _skip(self, count: int) -> None:
        self._take(count)

    def _protocol(self) -> None:
        version = self._unsigned(1)
        if not 2 <= version <= 5:
            raise ValueError(
                f"the pickle has protocol {version}; protocols 2 to 5 are read"
            )

    def _unsupported(self, opcode: int) -> str:
        if opcode in b"ILFSVgpldP":
            return (
                "the pickle has a text protocol (0 or 1); save the file again with "
                "torch.save or with protocol 2 or later"
            )
        what = _REFUSED.get(opcode, "something that is no pickle opcode")
        return f"the pickle holds {what} (byte 0x{opcode:02x} at {self.position - 1})"


def _fresh(make: Callable[[], object]) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(make())


def _sized(method: Callable, *sizes: tuple[int, int]) -> dict[int, Callable]:
    """Opcodes that share a method and differ in a number."""
    return {op: (lambda reader, n=n: method(reader, n)) for op, n in sizes}


_R = PickleReader
_STEPS: dict[int, Callable[[PickleReader], None]] = {
    # Constants and empty containers; sets are kept as lists.
    ord("N"): _fresh(lambda: None),
    0x88: _fresh(lambda: True),
    0x89: _fresh(lambda: False),
    ord(")"): _fresh(tuple),
    ord("]"): _fresh(list),
    ord("}"): _fresh(dict),
    0x8F: _fresh(list),
    # Numbers
    **_sized(lambda r, n: r._push(r._unsigned(n)), (ord("K"), 1), (ord("M"), 2)),
    ord("J"): lambda r: r._push(int.from_bytes(r._take(4), "little", signed=True)),
    ord("G"): lambda r: r._push(struct.unpack(">d", r._take(8))[0]),
    **_sized(_R._push_long, (0x8A, 1), (0x8B, 4)),
    # Strings, by the width of their length
    **_sized(_R._push_text, (0x8C, 1), (ord("X"), 4), (0x8D, 8)),
    **_sized(_R._push_bytes, (ord("C"), 1), (ord("B"), 4), (0x8E, 8), (0x96, 8)),
    **_sized(_R._push_string, (ord("U"), 1), (ord("T"), 4)),
    # Groups
    ord("("): _R._mark,
    ord("0"): _R._discard,
    ord("1"): lambda r: r._pop_marked().clear(),
    ord("t"): lambda r: r._push(tuple(r._pop_marked())),
    0x91: lambda r: r._push(r._pop_marked()),
    **_sized(_R._push_tuple, (0x85, 1), (0x86, 2), (0x87, 3)),
    ord("a"): lambda r: r._append([r._pop()]),
    ord("e"): lambda r: r._append(r._pop_marked()),
    0x90: lambda r: r._append(r._pop_marked()),
    ord("s"): lambda r: r._set_items([r._pop(), r._pop()][::-1]),
    ord("u"): lambda r: r._set_items(r._pop_marked()),
    # Memo
    **_sized(lambda r, n: r._remember(r._unsigned(n)), (ord("q"), 1), (ord("r"), 4)),
    0x94: lambda r: r._remember(len(r._memo)),
    **_sized(lambda r, n: r._recall(r._unsigned(n)), (ord("h"), 1), (ord("j"), 4)),
    # Names, calls, states
    ord("c"): lambda r: r._push(r._find(r._line(), r._line())),
    0x93: _R._find_on_stack,
    ord("R"): _R._reduce,
    0x81: _R._reduce,
    0x92: _R._new_with_keywords,
    ord("i"): _R._instance,
    ord("o"): _R._object,
    ord("b"): _R._build,
    ord("Q"): _R._push_persistent,
    # Framing
    0x80: _R._protocol,
    0x95: lambda r: r._skip(8),
}
_REFUSED = {
    0x82: "an entry of the extension registry",
    0x83: "an entry of the extension registry",
    0x84: "an entry of the extension registry",
    0x97: "a buffer kept outside the file",
    0x98: "a buffer kept outside the file",
}
