"""What a filter computes with: a column (1-D array) or one constant for all rows.

NumPy's own rules wrap small integers, compare text with numbers silently and take bool + bool for *or*;
these functions compute exactly or raise SchemaError. Integers are int64, arithmetic with a float is float64,
and a float column is compared in its own precision, so that a float32 0.1 equals 0.1.
Constants stay Python's (NumPy lets those take a column's dtype), so that every result is an array or a Python scalar.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError

Column = npt.NDArray[Any]
Operand = Any  # Column | bool | int | float | str | None; an alias that says so, for numpy's stubs refuse the union

_KINDS = {"b": "bool", "i": "number", "u": "number", "f": "number", "U": "text", "O": "text", "T": "text"}
_COMPARISONS: dict[str, Callable[[Operand, Operand], Operand]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARITHMETIC: dict[str, np.ufunc] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.true_divide,
    "//": np.floor_divide,
    "%": np.remainder,
    "**": np.power,
}


def column(name: str, values: npt.ArrayLike) -> Column:
    """A column ready to compute with: 1-D bool, int64 (uint64 where that is too small), float or text (str, object)."""
    given: Column = np.asarray(values)
    if given.ndim != 1 or given.dtype.kind not in _KINDS:
        raise SchemaError(
            f"column {name!r} has dtype {given.dtype} and shape {given.shape}, and a filter cannot use it",
            hint="a filter uses one bool, number or text for each row",
        )
    if given.dtype.kind in "iu" and not (given.dtype == np.uint64 and given.size and given.max() >= 2**63):
        return given.astype(np.int64, copy=False)
    return given


def truth(value: Operand) -> Operand:
    """The value itself if it is true or false."""
    if _kind(value) != "bool":
        raise SchemaError(f"true or false is needed here, not {called(value)}", hint="compare it: (column > 0)")
    return value


def opposite(value: Operand) -> Operand:
    """``not value``, row by row."""
    return _plain(np.logical_not(truth(value)))


def number(value: Operand) -> Operand:
    """The value as int64 or float; true counts as 1."""
    if _kind(value) == "bool":
        return value.astype(np.int64) if isinstance(value, np.ndarray) else int(value)
    too_large = value.dtype == np.uint64 if isinstance(value, np.ndarray) else isinstance(value, int) and value >= 2**63
    if _kind(value) != "number" or too_large:
        raise SchemaError(f"a number within int64 is needed here, not {called(value)}")
    return value


def compared(symbol: str, left: Operand, right: Operand) -> Operand:
    """``left symbol right``; equality with None asks whether a value is missing (NaN, or None among objects)."""
    if left is None or right is None:
        if symbol not in ("==", "!="):
            raise SchemaError(f"None has no order for {symbol}")
        return _plain(_missing(right if left is None else left) == (symbol == "=="))
    if (_kind(left) == "text") != (_kind(right) == "text"):
        raise SchemaError(f"{called(left)} {symbol} {called(right)}", hint="text compares with text only")
    left, right = _wide_enough(left, right), _wide_enough(right, left)
    try:
        return _plain(_COMPARISONS[symbol](left, right))
    except (TypeError, ValueError) as error:  # objects that are not text after all
        raise SchemaError(f"{called(left)} {symbol} {called(right)}: {error}") from None


def contained(wanted: Sequence[Any], value: Operand) -> Operand:
    """Whether `value` is one of `wanted` (all text or all numbers, no NaN)."""
    if wanted and (_kind(value) == "text") != isinstance(wanted[0], str):
        raise SchemaError(f"{called(value)} in a list with {called(wanted[0])}", hint="text compares with text only")
    if not isinstance(value, np.ndarray):
        return value in wanted
    if _kind(value) == "text":
        return np.isin(value, np.array(wanted, None if wanted else "U1"))
    value = value.astype(np.int64) if value.dtype == np.bool_ else value
    if value.dtype.kind == "f":
        largest = float(np.finfo(value.dtype).max)
        equal = [w for w in wanted if abs(w) <= largest or abs(w) == math.inf]
    else:  # what is no integer, or none of this range, equals no row; an array of both would be float64 and inexact
        limits = np.iinfo(value.dtype)
        equal = [int(w) for w in wanted if limits.min <= w <= limits.max and w == math.floor(w)]
    return np.isin(value, np.array(equal, value.dtype))


def computed(symbol: str, left: Operand, right: Operand) -> Operand:
    """``left symbol right`` on two numbers: int64 if both are (and not for ``/`` and ``**``), else float64."""
    rule = _ARITHMETIC[symbol]
    left, right = number(left), number(right)
    floats = np.asarray(left, np.float64), np.asarray(right, np.float64)
    rough = rule(*floats)
    no_integers = symbol in ("/", "**") or (symbol in ("//", "%") and not np.all(right))  # NumPy: 5 // 0 is 0
    if no_integers or not (_is_integer(left) and _is_integer(right)):
        return _plain(rough)
    if np.any(np.abs(rough) >= 2.0**63):
        raise SchemaError(
            f"{symbol} leaves the range of int64 here", hint="multiply a number by 1.0 for floating point"
        )
    return _plain(rule(left, right))


def negated(value: Operand) -> Operand:
    """``-value``."""
    value = number(value)
    return computed("-", 0, value) if _is_integer(value) else -value


def absolute(value: Operand) -> Operand:
    """``abs(value)``."""
    value = number(value)
    return _plain(np.abs(value)) if not _is_integer(value) else extreme(np.maximum, value, negated(value))


def extreme(rule: np.ufunc, *values: Operand) -> Operand:
    """`rule` (fmin or fmax) over the rows of one column, row by row over several; NaN where there are no rows."""
    numbers = [number(value) for value in values]
    if len(numbers) > 1:
        return folded(rule, *numbers)
    rows = np.atleast_1d(numbers[0])
    return _plain(rule.reduce(rows)) if rows.size else math.nan


def folded(rule: np.ufunc, *values: Operand) -> Operand:
    """`rule` between the first and the second, the result and the third, and so on."""
    result = values[0]
    for value in values[1:]:
        result = _plain(rule(result, value))
    return result


def mapped(rule: np.ufunc, value: Operand) -> Operand:
    """`rule` (isnan, isfinite) of each number."""
    return _plain(rule(number(value)))


def called(value: Operand) -> str:
    """The value's name in a message."""
    if isinstance(value, np.ndarray):
        return f"a column of {'text' if _kind(value) == 'text' else value.dtype}"
    return f"the {_kind(value)} {value!r}" if isinstance(value, (int, float, str)) else repr(value)


def _kind(value: Operand) -> str:
    if isinstance(value, np.ndarray):
        return _KINDS[value.dtype.kind]
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "none" if value is None else "number"


def _is_integer(value: Operand) -> bool:
    return value.dtype.kind == "i" if isinstance(value, np.ndarray) else isinstance(value, int)


def _missing(value: Operand) -> Operand:
    if not isinstance(value, np.ndarray):
        return value is None or value != value
    if value.dtype.kind == "f":
        return np.isnan(value)
    return value == None if value.dtype == object else np.zeros(len(value), np.bool_)  # noqa: E711 (row by row)


def _wide_enough(value: Operand, constant: Operand) -> Operand:
    """A float column in which the constant is finite: 1e5 as float16 would be infinite."""
    if not (isinstance(value, np.ndarray) and value.dtype.kind == "f" and isinstance(constant, (int, float))):
        return value
    return value.astype(np.float64) if float(np.finfo(value.dtype).max) < abs(constant) < math.inf else value


def _plain(value: Operand) -> Operand:
    """NumPy's scalars as Python's: they would impose their dtype on the next column."""
    return value.item() if isinstance(value, np.generic) else value
