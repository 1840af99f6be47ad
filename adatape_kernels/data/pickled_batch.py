"""Reads the pickle that a python batch of CIFAR-10 is, without Python's unpickler.

A pickle is a program for a small stack machine, which can call any function and ask for any amount
of memory. The machine here has only the instructions that a dictionary of numbers, texts, lists and
numpy arrays is written with, in the protocols 0 to 5. It calls nothing that a file names, nests no
deeper than such a dictionary does, and takes no more memory than a small multiple of the file.

Source: the Python library, pickletools, which describes every instruction.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

MOST_INSTRUCTIONS = 1 << 20
"""Most instructions that a file may consist of; 10,000 images take 20,000 to 100,000."""

# Numbers are labels and sizes, which have up to 8 bytes or 20 characters.
_MOST_NUMBER_BYTES = 8
_MOST_DIGITS = 20
# The longest tuple is a dtype's state, and the longest name `numpy._core.multiarray._reconstruct`.
_MOST_IN_TUPLE = 16
_MOST_NAME_CHARACTERS = 100
# What Python 2 escapes in the text of a string: a quote, a backslash, a line break, a byte.
_OTHER_ESCAPE = re.compile(rb"\\(?!['\"nrt]|x[0-9a-fA-F]{2})")


class _Name(NamedTuple):
    """A class or function that the file names; it is compared, and never looked up or called."""

    module: str
    name: str


class _Dtype(NamedTuple):
    """Stands for a numpy.dtype."""

    code: object


class PickledArray:
    """Stands for a numpy array: what numpy would have rebuilt it from."""

    __slots__ = ("state",)

    def __init__(self, state: tuple[Any, ...] = ()):
        self.state = state

    def pixels(self) -> tuple[tuple[int, ...], bytes | bytearray]:
        """Return shape and bytes of a uint8 array in row-major order.

        Raises:
            ValueError: the array is of another type or order.
        """
        match self.state:
            case (
                int(),
                tuple() as shape,
                _Dtype(code=b"u1" | "u1"),
                False | 0,
                bytes() | bytearray() as content,
            ) if all(type(length) is int for length in shape):
                return shape, content
        raise ValueError("data that is not an array of unsigned bytes")


_RECONSTRUCT = {
    _Name(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
}
_FROM_BUFFER = {
    _Name(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")
}
_NDARRAY, _DTYPE, _ENCODE = (
    _Name("numpy", "ndarray"),
    _Name("numpy", "dtype"),
    _Name("_codecs", "encode"),
)
_NAMES = {*_RECONSTRUCT, *_FROM_BUFFER, _NDARRAY, _DTYPE, _ENCODE}

_SCALARS = (int, str, bytes, bytearray, bool, type(None))
_MARK = object()


def parse_batch(content: bytes) -> dict[str, Any]:
    """Return the dictionary that a pickle describes; names that are bytes become texts.

    Its values are scalars, lists of scalars and PickledArrays.

    Raises:
        ValueError: the file is cut, or does anything that such a dictionary does not need.

    Example:
        >>> import pickle
        >>> from adatape_kernels.data.pickled_batch import parse_batch
        >>> parse_batch(pickle.dumps({"labels": [6, 9]}))
        {'labels': [6, 9]}
    """
    batch = _Machine(content).run()
    if not isinstance(batch, dict):
        raise ValueError("something else than a dictionary")
    return {
        name.decode("latin-1") if isinstance(name, bytes) else name: value
        for name, value in batch.items()
    }


class _Machine:
    """The stack machine; an instruction is a method, which `_INSTRUCTIONS` finds by its byte."""

    def __init__(self, content: bytes):
        self.content = content
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded_bytes = 0

    def run(self) -> Any:
        """Follow the instructions until the last, and return what they leave."""
        for _ in range(MOST_INSTRUCTIONS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"the instruction {code!r}, which no batch has")
            instruction(self)
        raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")

    # What instructions read after their byte.

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.content):
            raise ValueError("a cut file")
        return self.content[start : self.position]

    def number(self, size: int) -> int:
        """Return the unsigned number in the next bytes."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        """Return the next bytes up to a line break."""
        end = self.content.find(b"\n", self.position)
        if end < 0:
            raise ValueError("a cut file")
        start, self.position = self.position, end + 1
        return self.content[start:end]

    def decimal(self) -> int:
        """Return the number that is written in the next line; an L may follow it."""
        digits = self.line().removesuffix(b"L")
        if len(digits) > _MOST_DIGITS or not re.fullmatch(rb"-?[0-9]+", digits):
            raise ValueError(f"the number {digits[:_MOST_DIGITS]!r}")
        return int(digits)

    def text(self, size: int) -> str:
        """Return the UTF-8 text in the next bytes."""
        try:
            return self.take(size).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise ValueError("a text that is not UTF-8") from None

    # The stack.

    def pop(self) -> Any:
        """Take the last value of the stack, which no mark may precede."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an instruction without a value to work on")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take all values since the last mark."""
        if not self.marks:
            raise ValueError("an instruction without a mark")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind: type) -> Any:
        """Return the last value of the stack, which must be of a type."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an instruction without a value to work on")
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"an instruction that expects a {kind.__name__}")
        return self.stack[-1]

    # Instructions.

    def mark(self) -> None:
        """Mark the place where values begin that a later instruction takes together."""
        self.marks.append(len(self.stack))

    def remember(self, index: int) -> None:
        """Note the last value of the stack under a number."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an instruction without a value to work on")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Push the value that was noted under a number."""
        if index not in self.memo:
            raise ValueError(f"a reference to the value {index}, which was not noted")
        self.stack.append(self.memo[index])

    def quoted(self) -> None:
        """Push the bytes that Python 2 wrote as a text in quotes."""
        line = self.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a text without its quotes")
        body = line[1:-1]
        # Without the escaped backslashes, each backslash that is left begins another escape.
        if _OTHER_ESCAPE.search(body.replace(rb"\\", b"")):
            raise ValueError("a text with an unknown escape")
        self.stack.append(body.decode("unicode_escape").encode("latin-1"))

    def unicode_line(self) -> None:
        """Push the text in the next line, in which other characters are written as \\uXXXX."""
        try:
            self.stack.append(self.line().decode("raw_unicode_escape"))
        except UnicodeDecodeError:
            raise ValueError("a text with an unknown escape") from None

    def integer_line(self) -> None:
        """Push the number, or the truth value, in the next line."""
        truth = {b"00\n": False, b"01\n": True}.get(self.content[self.position : self.position + 3])
        if truth is None:
            self.stack.append(self.decimal())
        else:
            self.stack.append(truth)
            self.position += 3

    def long_integer(self) -> None:
        """Push a signed number, whose length stands before it."""
        size = self.number(1)
        if size > _MOST_NUMBER_BYTES:
            raise ValueError(f"a number of {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def append(self, values: list[Any]) -> None:
        """Extend the list that is the last value of the stack."""
        found = self.top(list)
        for value in values:
            if not isinstance(value, _SCALARS):
                raise ValueError(f"a {_kind(value)} in a list")
        found.extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Put names and values, in turn, into the dictionary that is the stack's last value."""
        found = self.top(dict)
        if len(values) % 2:
            raise ValueError("a name without a value")
        for name, value in zip(values[::2], values[1::2], strict=True):
            if type(name) not in (str, bytes):
                raise ValueError(f"a {_kind(name)} as a name")
            if not isinstance(value, (*_SCALARS, list, PickledArray)):
                raise ValueError(f"a {_kind(value)} in a dictionary")
            found[name] = value

    def make_tuple(self, values: list[Any]) -> None:
        """Push a tuple, which is short; those inside of it hold scalars only."""
        if len(values) > _MOST_IN_TUPLE:
            raise ValueError(f"a tuple of {len(values)} values")
        for value in values:
            flat = not isinstance(value, tuple) or isinstance(value, (_Name, _Dtype))
            if not (flat or all(isinstance(inner, _SCALARS) for inner in value)):
                raise ValueError("tuples that are nested more than twice")
            if isinstance(value, (list, dict, PickledArray)):
                raise ValueError(f"a {_kind(value)} in a tuple")
        self.stack.append(tuple(values))

    def make_list(self) -> None:
        """Push a list of the values since the last mark."""
        values = self.pop_to_mark()
        self.stack.append([])
        self.append(values)

    def make_dict(self) -> None:
        """Push a dictionary of the names and values since the last mark."""
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def name(self, module: object, name: object) -> None:
        """Push one of the few names that a batch needs."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        if len(module) + len(name) > _MOST_NAME_CHARACTERS:
            raise ValueError(f"a forbidden name of {len(module) + len(name)} characters")
        if _Name(module, name) not in _NAMES:
            raise ValueError(f"the forbidden name {module}.{name}")
        self.stack.append(_Name(module, name))

    def global_lines(self) -> None:
        """Push the name whose module and own name stand in the next two lines."""
        module, name = (self.line().decode("utf-8", "backslashreplace") for _ in range(2))
        self.name(module, name)

    def stack_global(self) -> None:
        """Push the name whose module and own name are the last two values of the stack."""
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        """Push what stands for the result of a call."""
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise ValueError("a call of something else than a name")
        self.stack.append(self.result(function, arguments))

    def result(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for the result of one of the known functions."""
        match arguments:
            case (_Name(), tuple(), bytes() | str()) if function in _RECONSTRUCT:
                return PickledArray()
            case (bytes() | bytearray() as data, _Dtype() as dtype, tuple() as shape, "C") if (
                function in _FROM_BUFFER
            ):
                return PickledArray((1, shape, dtype, False, data))
            case (bytes() | str() as code, *_) if function == _DTYPE:
                return _Dtype(code)
            case (str() as text, "latin1") if function == _ENCODE:
                # Python 3 writes bytes like this where the protocol has none.
                self.encoded_bytes += len(text)
                if self.encoded_bytes > len(self.content):
                    raise ValueError("texts that are used more than once")
                try:
                    return text.encode("latin-1")
                except UnicodeEncodeError:
                    raise ValueError("a text that stands for no bytes") from None
        raise ValueError(f"a call of {function.module}.{function.name} with other arguments")

    def build(self) -> None:
        """Give the state to an array; that of a dtype does not matter to single bytes."""
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if type(state) is not tuple or not isinstance(target, (PickledArray, _Dtype)):
            raise ValueError("a state of something else than an array")
        if isinstance(target, PickledArray):
            target.state = state


def _kind(value: object) -> str:
    """Return the name of a value's type."""
    return type(value).__name__.strip("_").lower()


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # the protocol
    b"\x95": lambda m: m.take(8),  # the length of a frame
    b"(": _Machine.mark,
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"I": _Machine.integer_line,
    b"L": lambda m: m.stack.append(m.decimal()),
    b"J": lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
    b"K": lambda m: m.stack.append(m.number(1)),
    b"M": lambda m: m.stack.append(m.number(2)),
    b"\x8a": _Machine.long_integer,
    b"S": _Machine.quoted,
    b"U": lambda m: m.stack.append(m.take(m.number(1))),
    b"T": lambda m: m.stack.append(m.take(m.number(4))),
    b"C": lambda m: m.stack.append(m.take(m.number(1))),
    b"B": lambda m: m.stack.append(m.take(m.number(4))),
    b"\x8e": lambda m: m.stack.append(m.take(m.number(8))),
    b"\x96": lambda m: m.stack.append(m.take(m.number(8))),  # a bytearray
    b"V": _Machine.unicode_line,
    b"\x8c": lambda m: m.stack.append(m.text(m.number(1))),
    b"X": lambda m: m.stack.append(m.text(m.number(4))),
    b"\x8d": lambda m: m.stack.append(m.text(m.number(8))),
    b"}": lambda m: m.stack.append({}),
    b"d": _Machine.make_dict,
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"]": lambda m: m.stack.append([]),
    b"l": _Machine.make_list,
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b")": lambda m: m.make_tuple([]),
    b"t": lambda m: m.make_tuple(m.pop_to_mark()),
    b"\x85": lambda m: m.make_tuple([m.pop()]),
    b"\x86": lambda m: m.make_tuple([m.pop() for _ in range(2)][::-1]),
    b"\x87": lambda m: m.make_tuple([m.pop() for _ in range(3)][::-1]),
    b"p": lambda m: m.remember(m.decimal()),
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(m.decimal()),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"c": _Machine.global_lines,
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
