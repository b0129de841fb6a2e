"""The stack, the memo and the byte cursor of the pickle machine."""

from __future__ import annotations

from rvc_mlx.formats.pickle_values import MAX_NAME_LENGTH, Foreign, text_key

MAX_OPCODES = 500_000
MAX_INTEGER_BYTES = 64
_VIEW_FROM_BYTES = 1024  # longer byte strings stay views of the file


class PickleStack:
    """Takes values from a pickle's bytes and groups them; knows no classes.

    Args:
        data: the bytes, as an unsigned 8-bit view.
    """

    def __init__(self, data: memoryview):
        self._data = data
        self._opcodes_left = MAX_OPCODES
        self._copies_left = len(data)
        self._stack: list = []
        self._marked: list[list] = []
        self._memo: dict[int, object] = {}
        self.position = 0

    def charge(self, items: int = 0, copied: int = 0) -> None:
        """Count work: ``items`` made and bytes ``copied`` beyond the file's own.

        Raises:
            ValueError: the pickle has used up its allowance.
        """
        self._opcodes_left -= items
        self._copies_left -= copied
        if self._opcodes_left < 0 or self._copies_left < 0:
            raise ValueError(
                f"the pickle takes more than {MAX_OPCODES} steps or copies more than "
                "its own size; no voice needs that"
            )

    # Reading bytes and stack entries

    def _next_opcode(self) -> int:
        position = self.position
        if position >= len(self._data):
            raise ValueError("the pickle is cut short")
        self.position = position + 1
        self._opcodes_left -= 1
        if self._opcodes_left < 0:
            self.charge()
        return self._data[position]

    def _take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self._data):
            raise ValueError("the pickle is cut short")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        ahead = bytes(self._data[self.position : self.position + MAX_NAME_LENGTH + 1])
        length = ahead.find(b"\n")
        if length < 0:
            raise ValueError("the pickle is cut short, or a name in it is too long")
        self.position += length + 1
        return _text(ahead[:length])

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise ValueError(
                "the pickle is damaged: it takes a value that is not there"
            )
        return self._stack.pop()

    def _peek(self) -> object:
        if not self._stack:
            raise ValueError("the pickle is damaged: it uses a value that is not there")
        return self._stack[-1]

    def _pop_marked(self) -> list:
        if not self._marked:
            raise ValueError("the pickle is damaged: a group ends that never began")
        items, self._stack = self._stack, self._marked.pop()
        return items

    # Groups

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _discard(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_marked()

    def _append(self, items: list) -> None:
        target = self._peek()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise ValueError(f"the pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list) -> None:
        target = self._peek()
        if len(items) % 2:
            raise ValueError("the pickle is damaged: a dict key has no value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[text_key(key)] = value
        elif not isinstance(target, Foreign):
            raise ValueError(f"the pickle sets items of a {type(target).__name__}")

    # Memo

    def _remember(self, index: int) -> None:
        self._memo[index] = self._peek()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"the pickle is damaged: it has no value number {index}")
        self._push(self._memo[index])

    # Values

    def _push_text(self, width: int) -> None:
        self._push(_text(self._take(self._unsigned(width))))

    def _push_bytes(self, width: int) -> None:
        view = self._take(self._unsigned(width))
        self._push(bytes(view) if len(view) < _VIEW_FROM_BYTES else view)

    def _push_string(self, width: int) -> None:
        """A Python 2 string: text if it is UTF-8, bytes otherwise."""
        raw = bytes(self._take(self._unsigned(width)))
        try:
            self._push(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._push(raw)

    def _push_long(self, width: int) -> None:
        length = self._unsigned(width)
        if length > MAX_INTEGER_BYTES:
            raise ValueError(f"the pickle holds an integer of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _push_tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(items)))


def _text(raw: bytes | memoryview) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("the pickle is damaged: a text is not UTF-8") from error
