"""A pickle machine that knows arrays and plain values, and nothing else.

It carries out the opcodes of protocols 2 to 5 that NumPy's pickles consist of.
A global is never looked up: the few that are known stand for functions of
:mod:`trajstore.npz.known`, and any other name ends the reading.

``elements`` gives the elements of an object array as soon as each is complete.
A pickle does not say where an element ends.  But an array is final once it is
built and a container once its items have been put in, unless it is part of a
tuple or the value of an outer container, whose opcode would follow at once;
``_settle`` is that rule, and whatever it cannot decide waits for the end of
the batch (pickle's, of 1,000).  An opcode that reaches for an element already
given away ends the reading with :class:`NotStreamableError`.

Pickle's memo would keep every element alive, for a later reference to it.
References to names, dtypes and short strings are common and kept; for the rest
some 16 MiB of the stream are, and a reference further back raises
:class:`NotStreamableError`, upon which the whole can be loaded instead.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trajstore.errors import FormatError
from trajstore.npz.known import GLOBALS, Global, Unbuilt, as_key, require
from trajstore.npz.memo import WHOLE, Memo, NotStreamableError
from trajstore.npz.stream import Stream

__all__ = ["Block", "NotStreamableError", "Unpickler"]

_MAX_MARKS = 64
_MAX_DEPTH = 64
_MAX_OPCODES = 1 << 22  # of one element
_MAX_OPCODES_WHOLE = 1 << 26
_MAX_LONG = 1 << 10
_BATCH = 1000  # items that pickle.Pickler writes at a time

Array = np.ndarray[Any, Any]


class Block:
    """A run of Python numbers, as one array (float64 or uint8)."""

    __slots__ = ("values",)

    def __init__(self, values: Array) -> None:
        self.values = values


class _Sink(list[Any]):
    """The list of the outer array's elements, which stays empty: they are given away."""


class Unpickler:
    """Reads one pickle from a stream, once."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._place = stream.place
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._sink: _Sink | None = None
        self._streaming = self._blocks = False
        self._given = 0  # elements of the current batch given away
        self._open: set[int] = set()  # ids of the batch's containers that may yet get items
        self._opcodes = 0
        self._room = _MAX_OPCODES_WHOLE
        self._memo = Memo(stream)
        self.shape: tuple[int, ...] | None = None
        """Of the outer object array, once ``elements`` has come to it."""

    def load(self) -> Any:
        """The whole value. Arrays in it are read-only views of the bytes read."""
        for _ in self._run():
            pass
        value = self._stack.pop()
        for element in value.flat if isinstance(value, np.ndarray) else [value]:
            if type(element) not in _PLAIN:
                self._check(element)
        return value

    def elements(self, *, blocks: bool = False) -> Iterator[Any]:
        """The elements of an object array in C order, each once it is complete.

        With ``blocks`` runs of floats and of small ints come as :class:`Block`, which tuples of numbers
        are mistaken for. Ends without an element if the pickle is no object array.
        """
        self._streaming, self._blocks = True, blocks
        self._room = _MAX_OPCODES
        for element in self._run():
            if type(element) not in _PLAIN:
                self._check(element)
            yield element

    def _run(self) -> Iterator[Any]:
        stream, opcodes = self._stream, self._OPCODES
        while (op := stream.byte()) != _STOP:
            if self._in_batch():
                if op in _STARTS:
                    yield from self._settle()
                if self._blocks and op in _RUNS and not self._stack:
                    self._given += 1
                    yield Block(stream.run(op, _RUNS[op]))
                    continue
            self._opcodes += 1
            if self._opcodes > self._room:
                raise FormatError(f"{self._place}: a value of more than {self._room:,} parts", hint=_HINT)
            action = opcodes.get(op)
            if action is None:
                raise FormatError(f"{self._place}: pickle opcode {op:#04x} is not one that NumPy writes", hint=_HINT)
            try:
                finished = action(self)
            except (IndexError, TypeError, AttributeError, ValueError, OverflowError, struct.error) as error:
                raise self._malformed(error) from error
            if finished is not None:
                for element in finished:
                    yield element
                    self._memo.element_ended()
                self._opcodes = 0
        if self._marks or len(self._stack) != 1:
            raise FormatError(f"{self._place}: the pickle ends in the middle of a value", hint=_HINT)

    def _malformed(self, error: Exception) -> FormatError:
        if self._given:
            return NotStreamableError(
                f"{self._place}: elements that are tuples of arrays cannot be read one by one", hint=WHOLE
            )
        return FormatError(f"{self._place}: malformed pickle ({error})", hint=_HINT)

    # --- elements of the outer array --------------------------------------------------------

    def _in_batch(self) -> bool:
        return self._sink is not None and len(self._marks) == 2 and self._marks[1][-1] is self._sink

    def _settle(self) -> Iterator[Any]:
        """Called when a new value begins: gives the leading elements that nothing can change any more."""
        stack, open_ = self._stack, self._open
        if stack and type(stack[-1]) in _FINAL and id(stack[-1]) not in open_:
            # a container below it would have taken it in by now: it is an empty one
            open_.clear()
        while stack and type(stack[0]) in _FINAL and id(stack[0]) not in open_:
            self._given += 1
            yield stack.pop(0)
            self._memo.element_ended()
            self._opcodes = 0

    def _opened(self, value: Any) -> None:
        if self._in_batch():
            self._open.add(id(value))

    def _closed(self, value: Any, items: int) -> None:
        if items < _BATCH:
            self._open.discard(id(value))

    def _check(self, value: Any) -> None:
        """Refuse what would hurt whoever walks through the value: depth, cycles, names in the place of values."""
        room = _MAX_OPCODES
        walk = [(value, 0)]
        while walk:
            value, depth = walk.pop()
            room -= 1
            if depth > _MAX_DEPTH or room < 0:
                raise FormatError(f"{self._place}: a value nested deeper than {_MAX_DEPTH} or in itself", hint=_HINT)
            if isinstance(value, (list, tuple, set, frozenset)):
                walk.extend((item, depth + 1) for item in value)
            elif isinstance(value, dict):
                walk.extend((item, depth + 1) for item in value.values())
            elif isinstance(value, np.ndarray) and value.dtype.hasobject:
                walk.extend((item, depth + 1) for item in value.reshape(-1))
            elif isinstance(value, (Global, Unbuilt)):
                name = value.name if isinstance(value, Global) else "an unfinished array"
                raise FormatError(f"{self._place}: {name} stands in the place of a value", hint=_HINT)

    # --- opcodes ------------------------------------------------------------------------------

    def _proto(self) -> None:
        version = self._stream.byte()
        if version > 5:
            raise FormatError(f"{self._place}: pickle protocol {version} is unknown")

    def _frame(self) -> None:
        self._stream.take(8)  # a hint for read-ahead

    def _mark(self) -> None:
        if len(self._marks) >= _MAX_MARKS:
            raise FormatError(f"{self._place}: a value nested deeper than {_MAX_MARKS}", hint=_HINT)
        self._marks.append(self._stack)
        self._stack = []
        if self._in_batch():
            self._given = 0
            self._open.clear()

    def _pop_mark(self) -> list[Any]:
        if self._given and self._in_batch():
            raise self._malformed(ValueError())
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _empty_list(self) -> None:
        if self._streaming and self._sink is None and len(self._marks) == 1 and self._is_outer_state():
            self._sink, self.shape = _Sink(), self._stack[1]
            self._stack.append(self._sink)
        else:
            self._stack.append([])
            self._opened(self._stack[-1])

    def _is_outer_state(self) -> bool:
        outer, state = self._marks[0], self._stack
        return len(outer) == 1 and type(outer[0]) is Unbuilt and len(state) == 4 and state[2] == np.dtype(object)

    def _empty_dict(self) -> None:
        self._stack.append({})
        self._opened(self._stack[-1])

    def _append(self) -> Any:
        item = self._stack.pop()
        target = self._stack[-1]
        if target is self._sink:
            return [item]
        require(type(target) is list, "APPEND to what is no list")
        target.append(item)
        self._closed(target, 1)
        return None

    def _appends(self) -> Any:
        if self._in_batch():
            items, self._stack, self._given = self._stack, self._marks.pop(), 0
            return items
        items = self._pop_mark()
        target = self._stack[-1]
        require(type(target) is list, "APPENDS to what is no list")
        target.extend(items)
        self._closed(target, len(items))
        return None

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        require(isinstance(target, dict) and len(items) % 2 == 0, "SETITEMS on what is no dict")
        for key, value in zip(items[::2], items[1::2]):
            target[as_key(key)] = value
        self._closed(target, len(items) // 2)

    def _additems(self) -> None:
        items = self._pop_mark()
        require(type(self._stack[-1]) is set, "ADDITEMS to what is no set")
        self._stack[-1].update(map(as_key, items))

    def _tuple(self) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _tuple_of(self, n: int) -> None:
        require(len(self._stack) >= n, "the stack is empty")
        items = tuple(self._stack[-n:])
        del self._stack[-n:]
        self._stack.append(items)

    def _global(self) -> None:
        self._push_global(self._stream.line(), self._stream.line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        require(type(name) is str and type(module) is str, "a name that is no string")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        make = GLOBALS.get((module.replace("numpy._core.", "numpy.core."), name))
        if make is None:
            raise FormatError(
                f"{self._place} asks to run {module[:200]}.{name[:200]}, which is refused: "
                "only arrays and plain values are read",
                hint="nothing was executed; if you trust the file, load it with numpy and save it as plain arrays",
            )
        self._stack.append(Global(f"{module}.{name}", make))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        require(type(function) is Global and type(arguments) is tuple, "a call of what is no function")
        value = function.make(arguments)
        self._stack.append(value)
        if type(value) is OrderedDict:
            self._opened(value)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack.pop()
        require(type(target) is Unbuilt, "a state for what takes none")
        streamed = self._sink is not None and not self._marks and not self._stack
        value = None if streamed else target.build(state)
        for key in target.keys:
            self._memo.replace(key, value)
        self._stack.append(value)

    def _memoize(self, key: int) -> None:
        value = self._stack[-1]
        if type(value) is Unbuilt:
            value.keys.append(key)
        self._memo.put(key, value)

    def _pop(self) -> None:
        self._stack.pop()

    def _discard(self) -> None:
        self._pop_mark()

    def _value(self, value: Any) -> None:
        self._stack.append(value)

    def _text(self, size: int) -> None:
        self._stack.append(self._stream.take(size).decode("utf-8", "surrogatepass"))

    def _long(self, size: int) -> None:
        require(0 <= size <= _MAX_LONG, "an int of too many digits")
        self._stack.append(int.from_bytes(self._stream.take(size), "little", signed=True))

    def _number(self, code: str) -> Any:
        layout = struct.Struct(code)
        return layout.unpack(self._stream.take(layout.size))[0]

    _OPCODES: dict[int, Callable[[Unpickler], Any]] = {
        0x80: _proto,
        0x95: _frame,
        ord("("): _mark,
        ord("0"): _pop,
        ord("1"): _discard,
        ord("N"): lambda self: self._value(None),
        0x88: lambda self: self._value(True),
        0x89: lambda self: self._value(False),
        ord("K"): lambda self: self._value(self._stream.byte()),
        ord("M"): lambda self: self._value(self._number("<H")),
        ord("J"): lambda self: self._value(self._number("<i")),
        0x8A: lambda self: self._long(self._stream.byte()),
        0x8B: lambda self: self._long(self._number("<i")),
        ord("G"): lambda self: self._value(self._number(">d")),
        ord("C"): lambda self: self._value(self._stream.take(self._stream.byte())),
        ord("B"): lambda self: self._value(self._stream.take(self._number("<I"))),
        0x8E: lambda self: self._value(self._stream.take(self._number("<Q"))),
        0x96: lambda self: self._value(bytearray(self._stream.take(self._number("<Q")))),
        0x8C: lambda self: self._text(self._stream.byte()),
        ord("X"): lambda self: self._text(self._number("<I")),
        0x8D: lambda self: self._text(self._number("<Q")),
        ord("]"): _empty_list,
        ord("}"): _empty_dict,
        ord(")"): lambda self: self._value(()),
        0x8F: lambda self: self._value(set()),
        0x91: lambda self: self._value(frozenset(map(as_key, self._pop_mark()))),
        ord("a"): _append,
        ord("e"): _appends,
        ord("s"): _setitem,
        ord("u"): _setitems,
        0x90: _additems,
        ord("t"): _tuple,
        0x85: lambda self: self._tuple_of(1),
        0x86: lambda self: self._tuple_of(2),
        0x87: lambda self: self._tuple_of(3),
        ord("c"): _global,
        0x93: _stack_global,
        ord("R"): _reduce,
        ord("b"): _build,
        ord("q"): lambda self: self._memoize(self._stream.byte()),
        ord("r"): lambda self: self._memoize(self._number("<I")),
        0x94: lambda self: self._memoize(self._memo.count),
        ord("h"): lambda self: self._value(self._memo.get(self._stream.byte())),
        ord("j"): lambda self: self._value(self._memo.get(self._number("<I"))),
    }


_STOP = ord(".")
_RUNS: dict[int, np.dtype[Any]] = {ord("G"): np.dtype(">f8"), ord("K"): np.dtype("u1")}
_PLAIN = (Block, float, int, bool, str, type(None))
_FINAL = (np.ndarray, list, dict, OrderedDict)
# opcodes that begin a value; the others act on what is on the stack already
_STARTS = frozenset(b"(NKMJGCBX]})chj\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x96")
_HINT = "it was not written by numpy.savez, or is damaged"
