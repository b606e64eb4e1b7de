"""Row filters such as ``"success & (length > 50)"``, read without ever running them as code.

`ast` parses the text, and each node of a short allow-list becomes a closure over columns; nothing else has a
meaning. A filter that Python would read otherwise than its writer meant is refused with the way to write it:
``success & length > 50`` is ``(success & length) > 50``, and nothing is ever ``== nan``.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from trajstore.errors import NotFoundError, SchemaError
from trajstore.format import operands
from trajstore.format.operands import Column, Operand

_Step = Callable[[Mapping[str, Column]], Operand]

_MAX_CHARS = 10_000
_MAX_DEPTH = 60  # of nested operators; a chain of one & or | is one level, however long
_EXAMPLE = "for example: success & (length > 50)"

_TOKEN = re.compile(
    r"`(?P<quoted>[A-Za-z0-9][A-Za-z0-9_.-]*)`"
    r"|(?P<triple>'{3}|\"{3})"
    r"""|(?P<text>'(?:\\.|[^'\\\r\n])*'|"(?:\\.|[^"\\\r\n])*")"""
    r"|(?P<number>\d\w*)|(?P<word>[^\W\d]\w*)|(?P<newline>[\r\n])|(?P<stray>[`#'\"\\])"
)
_STRAY = {"`": "a backtick that encloses no column name", "#": "a comment", "\\": "a backslash"}
_GRAMMAR_WORDS = frozenset({"and", "or", "not", "in", "is", "True", "False", "None"})
_CONSTANTS = {"nan": math.nan, "inf": math.inf}

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.In: "in",
    ast.NotIn: "not in",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
}
_BITWISE: dict[type[ast.operator], tuple[str, np.ufunc]] = {
    ast.BitAnd: ("&", np.logical_and),
    ast.BitOr: ("|", np.logical_or),
}
_FUNCTIONS: dict[str, Callable[..., Operand]] = {
    "abs": operands.absolute,
    "isnan": partial(operands.mapped, np.isnan),
    "isfinite": partial(operands.mapped, np.isfinite),
    "min": partial(operands.extreme, np.fmin),
    "max": partial(operands.extreme, np.fmax),
}

# `warnings.catch_warnings` swaps the process's list; two at once could leave ours in place for good.
_parsing = threading.Lock()


class Expression:
    """A filter over columns: parsed and checked once, evaluated on any rows.

    Comparisons (chained ones too), ``& | ~ and or not``, ``in`` and ``not in`` a list of constants,
    ``+ - * / // % **``, ``abs isnan isfinite``, ``min`` and ``max`` (of one column: over the rows given,
    NaN left out; of several values: row by row), numbers, text, ``True False None nan inf``.
    A column whose name is not an identifier stands in backticks: ```reward-mean` > 0``.

    Parameters
    ----------
    text : the filter, at most 10,000 characters.
    values : whether its result may be any number, and not only true or false.

    Attributes
    ----------
    text : the filter, without the spaces around it.
    names : the columns that it uses.

    Raises
    ------
    SchemaError
        It cannot be read; the message shows the text and points at the place.

    Notes
    -----
    ``column == None`` is true where a value is missing: NaN in a float column, None in one of objects.
    Integers compare and compute exactly, as int64, and an overflow is an error. ``/``, ``**`` and division
    by zero compute in float64. A float column compares in its own precision: a float32 0.1 equals 0.1.
    """

    text: str
    names: frozenset[str]

    def __init__(self, text: str, *, values: bool = False) -> None:
        if not isinstance(text, str):
            raise SchemaError(f"a filter is text, not {type(text).__name__}", hint=_EXAMPLE)
        if len(text) > _MAX_CHARS:
            raise SchemaError(
                f"the filter has {len(text):,} characters, more than {_MAX_CHARS:,}",
                hint="select by a mask or by a list of trajectories instead",
            )
        compiler = _Compiler(text.strip())
        self.text = compiler.text
        self._values = values
        self._step = compiler.compiled(values)
        self.names = frozenset(compiler.names)

    def check(self, columns: Iterable[str]) -> None:
        """Raise NotFoundError, with the nearest names, if one that the filter uses is not among `columns`."""
        known = sorted(columns)
        for name in sorted(self.names.difference(known)):
            near = " or ".join(map(_as_written, difflib.get_close_matches(name, known, cutoff=0.5)))
            raise NotFoundError(
                f"the filter names {name!r}, and the columns are: {', '.join(map(_as_written, known)) or 'none'}",
                hint=f"did you mean {near}?" if near else "",
            )

    def evaluate(self, columns: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The mask of the rows for which the filter holds; with ``values``, the result for each row.

        Parameters
        ----------
        columns : each name's 1-D array, all of one length N; only those in `names` are looked up, once each.

        Returns
        -------
        (N,) bool; with ``values`` also int64 or float

        Raises
        ------
        NotFoundError
            A name is not in `columns`.
        SchemaError
            The filter does not fit the columns' dtypes, or its result is not true or false.
        """
        self.check(columns)
        rows = {name: operands.column(name, columns[name]) for name in sorted(self.names)}
        lengths = {name: len(values) for name, values in rows.items()}
        if len(set(lengths.values())) > 1:
            raise SchemaError(f"the columns of a filter are of one length, and these are not: {lengths}")
        with np.errstate(all="ignore"):
            mask = self._step(rows)
        return np.array(np.broadcast_to(mask, (max(lengths.values()),)), None if self._values else np.bool_)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return partial(Expression, values=self._values), (self.text,)


class _Compiler:
    """Turns one text into a closure and collects the columns that it names."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        self._columns_at: dict[int, str] = {}  # place -> column, where backticks or a Python keyword name one

    def compiled(self, values: bool) -> _Step:
        tree = self._parsed()
        step = self._step(tree, 0) if values else self._apply(tree, operands.truth, self._step(tree, 0))
        if not self.names:
            self._refuse("no column is named", 0)
        return step

    def _parsed(self) -> ast.expr:
        if not self.text:
            raise SchemaError("the filter is empty", hint=_EXAMPLE)
        code = _TOKEN.sub(self._substitute, self.text)
        try:
            with _parsing, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of "\d" and 50and
                return ast.parse(code, mode="eval").body
        except SyntaxError as error:
            place = max((error.offset or 1) - 1, 0)
            self._refuse(error.msg, place, "write == to compare" if self.text[place : place + 1] == "=" else _EXAMPLE)
        except (RecursionError, MemoryError):
            self._refuse_depth(0)
        except UnicodeEncodeError as error:
            self._refuse("half of a surrogate pair", error.start)
        except ValueError as error:  # a null byte
            self._refuse(str(error), 0)

    def _substitute(self, token: re.Match[str]) -> str:
        """What Python's parser gets to see: as many characters, so that every place stays the same."""
        if token["newline"]:
            return " "
        if token["triple"]:
            self._refuse("text in triple quotes", token.start())
        if token["stray"]:
            self._refuse(_STRAY.get(token["stray"], "text that does not end"), token.start())
        word = token["word"]
        # A column may be called `return`; this also leaves `lambda`, `await` and their like without a meaning.
        name = token["quoted"] or (word if keyword.iskeyword(word or "") and word not in _GRAMMAR_WORDS else None)
        if name is None:
            return token.group()
        self._columns_at[token.start()] = name
        return "_" * len(token.group())

    def _apply(self, node: ast.expr, rule: Callable[..., Operand], *steps: _Step) -> _Step:
        """The step that applies `rule` to the results of `steps`; its errors point at `node`."""
        place = self._place(node)

        def step(rows: Mapping[str, Column]) -> Operand:
            values = [inner(rows) for inner in steps]
            try:
                return rule(*values)
            except SchemaError as error:
                self._refuse(error.message, place, error.hint)

        return step

    def _step(self, node: ast.expr, depth: int) -> _Step:
        if depth > _MAX_DEPTH:
            self._refuse_depth(self._place(node))
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Constant) or _is_signed(node):
            return _always(self._constant(node))
        if isinstance(node, ast.Compare):
            return self._comparison(node, depth + 1)
        if isinstance(node, ast.BoolOp):
            symbol, rule = ("and", np.logical_and) if isinstance(node.op, ast.And) else ("or", np.logical_or)
            for operand in node.values:
                self._forbid_bare_logic(operand, symbol)
            return self._logic(node, rule, node.values, depth + 1)
        if isinstance(node, ast.BinOp) and type(node.op) in _BITWISE:
            return self._logic(node, _BITWISE[type(node.op)][1], _chain(node), depth + 1)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            compute = partial(operands.computed, _ARITHMETIC[type(node.op)])
            return self._apply(node, compute, self._step(node.left, depth + 1), self._step(node.right, depth + 1))
        if isinstance(node, ast.UnaryOp):
            return self._unary(node, depth + 1)
        if isinstance(node, ast.Call):
            return self._call(node, depth + 1)
        hint = "a column with a dot in its name stands in backticks: `a.b`" if isinstance(node, ast.Attribute) else ""
        self._refuse(f"{type(node).__name__} has no meaning in a filter", self._place(node), hint)

    def _name(self, node: ast.Name) -> _Step:
        if node.id in _CONSTANTS:
            return _always(_CONSTANTS[node.id])
        name = self._columns_at.get(self._place(node), node.id)
        self.names.add(name)
        return lambda rows: rows[name]

    def _constant(self, node: ast.expr) -> Any:
        """The value of a literal or a signed one, and of nan and inf."""
        value: Any
        if isinstance(node, ast.UnaryOp) and _is_signed(node):
            value = self._constant(node.operand)
            value = -value if isinstance(node.op, ast.USub) else value
        elif isinstance(node, ast.Name) and node.id in _CONSTANTS:
            value = _CONSTANTS[node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
            value = node.value
        else:
            self._refuse("a number or text is needed here", self._place(node))
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            self._refuse("an integer beyond 64 bits", self._place(node), "write it as a float, such as 1e30")
        return value

    def _comparison(self, node: ast.Compare, depth: int) -> _Step:
        sides = [node.left, *node.comparators]
        links = []
        for op, left, right in zip(node.ops, sides, sides[1:]):
            symbol = _COMPARISONS.get(type(op))
            if symbol is None:
                self._refuse("`is` has no meaning in a filter", self._place(right), "write == or !=")
            self._forbid_bare_logic(left, symbol)
            if symbol in ("in", "not in"):
                found = self._apply(left, partial(operands.contained, self._list(right)), self._step(left, depth))
                links.append(found if symbol == "in" else self._apply(left, operands.opposite, found))
                continue
            self._forbid_bare_logic(right, symbol)
            for side in (left, right):
                if isinstance(side, ast.Name) and side.id == "nan":
                    self._refuse("nothing compares with nan", self._place(side), "write isnan(column)")
            compare = partial(operands.compared, symbol)
            links.append(self._apply(left, compare, self._step(left, depth), self._step(right, depth)))
        return self._apply(node, partial(operands.folded, np.logical_and), *links)

    def _list(self, node: ast.expr) -> list[Any]:
        if not isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            self._refuse("a list of constants is needed here", self._place(node), "for example: seed in (1, 2, 3)")
        wanted = [self._constant(item) for item in node.elts]
        if any(value is None or value != value for value in wanted):
            self._refuse("None and nan equal nothing in a list", self._place(node), "write: (...) or column == None")
        if len({isinstance(value, str) for value in wanted}) > 1:
            self._refuse("text and numbers in one list", self._place(node))
        return wanted

    def _logic(self, node: ast.expr, rule: np.ufunc, parts: list[ast.expr], depth: int) -> _Step:
        truths = [self._apply(part, operands.truth, self._step(part, depth)) for part in parts]
        return self._apply(node, partial(operands.folded, rule), *truths)

    def _unary(self, node: ast.UnaryOp, depth: int) -> _Step:
        step = self._step(node.operand, depth)
        if isinstance(node.op, ast.USub):
            return self._apply(node, operands.negated, step)
        if isinstance(node.op, ast.UAdd):
            return self._apply(node, operands.number, step)
        self._forbid_bare_logic(node.operand, "not")
        return self._apply(node.operand, operands.opposite, step)

    def _call(self, node: ast.Call, depth: int) -> _Step:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS:
            self._refuse("there is no such function", self._place(node), f"there are {', '.join(_FUNCTIONS)}")
        if node.keywords or not node.args or (len(node.args) > 1 and name not in ("min", "max")):
            self._refuse(f"{name} is given one column, and min and max also several values", self._place(node))
        return self._apply(node, _FUNCTIONS[name], *[self._step(argument, depth) for argument in node.args])

    def _forbid_bare_logic(self, node: ast.expr, symbol: str) -> None:
        """Refuse ``a & b > 1``, which Python reads as ``(a & b) > 1``."""
        if not (isinstance(node, ast.BinOp) and type(node.op) in _BITWISE):
            return
        before, behind = self.text[: self._place(node)].rstrip(), self.text[self._end(node) :].lstrip()
        if not (before.endswith("(") and behind.startswith(")")):
            tighter = _BITWISE[type(node.op)][0]
            hint = "put parentheses around each comparison: success & (length > 50)"
            self._refuse(f"{tighter} binds tighter than {symbol} here", self._place(node), hint)

    def _place(self, node: ast.expr) -> int:
        return self._characters(node.col_offset)

    def _end(self, node: ast.expr) -> int:
        return self._characters(node.end_col_offset or 0)

    def _characters(self, utf8_offset: int) -> int:
        return utf8_offset if self.text.isascii() else len(self.text.encode()[:utf8_offset].decode())

    def _refuse_depth(self, place: int) -> NoReturn:
        self._refuse("the filter is nested too deeply", place, "use a list: seed in (1, 2, 3)")

    def _refuse(self, problem: str, place: int, hint: str = "") -> NoReturn:
        """Raise SchemaError with the text, or its part around `place`, and a caret below the place."""
        place = min(max(place, 0), len(self.text))
        start = max(place - 60, 0) if len(self.text) > 100 else 0
        shown = "".join(c if c.isprintable() else "?" for c in self.text[start : start + 100])
        raise SchemaError(f"in a filter: {problem}\n  {shown}\n  {' ' * (place - start)}^", hint=hint) from None


def _always(constant: Operand) -> _Step:
    return lambda rows: constant


def _is_signed(node: ast.expr) -> bool:
    """Whether the node is a number, nan or inf behind one sign."""
    if not (isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd))):
        return False
    if isinstance(node.operand, ast.Name):
        return node.operand.id in _CONSTANTS
    return isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float)


def _chain(node: ast.BinOp) -> list[ast.expr]:
    """The parts of ``a & b & c``, which Python nests to the left."""
    parts = [node.right]
    inner = node.left
    while isinstance(inner, ast.BinOp) and type(inner.op) is type(node.op):
        parts.append(inner.right)
        inner = inner.left
    return [inner, *reversed(parts)]


def _as_written(name: str) -> str:
    plain = name.isidentifier() and name not in _CONSTANTS and name not in _GRAMMAR_WORDS
    return name if plain else f"`{name}`"
