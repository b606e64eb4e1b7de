"""What commands print: tables that are never cut, JSON, sizes and times, progress bars."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
import numpy as np

#: Called with what is done so far and what there is in all.
Progress = Callable[[int, int], None]

_BLOCK = 1 << 13  # rows of a long table formatted together


def plain(value: Any) -> Any:
    """A value as JSON holds it: dataclasses by attribute, their properties too; NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_json(value: Any) -> None:
    click.echo(_json(value, indent=2))


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON array, an element a line, without holding all of it."""
    click.echo("[", nl=False)
    for i, value in enumerate(values):
        click.echo((",\n " if i else "\n ") + _json(value), nl=False)
    click.echo("\n]")


def _json(value: Any, **settings: Any) -> str:
    """JSON in UTF-8, in which half a surrogate pair, which UTF-8 lacks, is escaped."""
    text = json.dumps(plain(value), ensure_ascii=False, **settings)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def print_columns(columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """A table of columns of any length, some thousands of rows at a time."""
    count = min((len(values) for values in columns.values()), default=0)
    blocks = [slice(first, first + _BLOCK) for first in range(0, count, _BLOCK)]
    widths = {
        name: max([len(name), *(len(text) for block in blocks for text in texts(values[block]))])
        for name, values in columns.items()
    }

    def padded(name: str, cells: Iterable[str]) -> list[str]:
        justify = str.rjust if columns[name].dtype.kind in "iuf" else str.ljust
        return [justify(text, widths[name]) for text in cells]

    click.echo("  ".join(padded(name, [name])[0] for name in columns).rstrip())
    for block in blocks:
        lines = zip(*(padded(name, texts(values[block])) for name, values in columns.items()))
        click.echo("\n".join("  ".join(line).rstrip() for line in lines))


def texts(values: np.ndarray[Any, Any]) -> list[str]:
    """Each value of a column as a table shows it."""
    if values.dtype.kind in "iu" or values.dtype == np.float64:
        return list(map(str, values.tolist()))
    return [cell(value) for value in values]


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, indent: str = "") -> None:
    """Aligned columns, numbers to the right; as wide as it has to be."""
    cells = [[cell(value) for value in row] for row in rows]
    right = [all(is_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(header)]
    for row in [list(header), *cells]:
        padded = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right)]
        click.echo(indent + "  ".join(padded).rstrip())


def print_pairs(pairs: Iterable[tuple[str, Any]], *, indent: str = "") -> None:
    """A name and a value on each line."""
    pairs = [(name, cell(value)) for name, value in pairs]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{indent}{name.ljust(width)}  {value}".rstrip())


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, np.generic):
        value = value.item() if not isinstance(value, np.floating) else value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, np.floating):
        return str(value)
    text = f"{value}" if not isinstance(value, (dict, list)) else json.dumps(plain(value), ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_number(text: str) -> bool:
    return (
        text == "-" or text.replace(",", "")[:1].isdigit() or text[:2].lstrip("-").isdigit() or text in ("nan", "inf")
    )


def size(count: float) -> str:
    """Bytes in units of 1,000: ``1.23 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """A count with thousands apart; a fraction with three digits."""
    return f"{count:,.0f}" if count >= 100 or count == int(count) else f"{count:.3g}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 12 s``, ``5 h 03 min``, ``12 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


@contextlib.contextmanager
def progress_bar(label: str, *, hidden: bool = False) -> Iterator[Progress | None]:
    """A callback that draws a bar on stderr; ``None`` where that is no terminal."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(click.progressbar(length=total, label=label, file=sys.stderr)))
            bars[0].length = total
            bars[0].update(done - bars[0].pos)

        yield advance
