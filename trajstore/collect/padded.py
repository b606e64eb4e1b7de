"""Finished trajectories side by side, padded to one length: ``[T, B, …]`` arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.collect.ring import leaves
from trajstore.engine.intake import as_array
from trajstore.errors import SchemaError
from trajstore.writer import Writer

Ints = np.ndarray[Any, np.dtype[np.int64]]


def append_padded(
    writer: Writer, fields: Mapping[str, Any], *, lengths: Any = None, done: Any = None, **columns: Any
) -> Ints:
    """Append the ``B`` trajectories of ``[T, B, …]`` arrays (NumPy or torch, nested dicts), without their padding.

    Parameters
    ----------
    lengths : int (B,), steps of each; or
    done : bool (T, B): each ends with its first true step, or with step T.
    columns : (B,) values each, or one for all.

    A field of T + 1 rows has one after each trajectory's last step. Returns the ids, int64 (B,).
    Raises what ``Writer.append_many`` raises.
    """
    flat = {path: as_array(path, value) for path, value in leaves(fields)}
    if done is not None:
        flags = as_array("done", done).astype(np.bool_)
        lengths = np.where(flags.any(axis=0), flags.argmax(axis=0) + 1, len(flags))
        steps = len(flags)
    elif lengths is not None:
        lengths = np.asarray(lengths)
        steps = min((len(rows) for rows in flat.values()), default=0)
    else:
        raise SchemaError("neither lengths nor done is given", hint="say where each trajectory ends")
    values = {}
    for path, rows in flat.items():
        if rows.ndim < 2 or rows.shape[1] != len(lengths) or len(rows) not in (steps, steps + 1):
            raise SchemaError(f"field {path!r} has the shape {rows.shape}, expected ({steps}, {len(lengths)}, …)")
        held = lengths + (len(rows) - steps)
        if (held > len(rows)).any():
            raise SchemaError(f"a trajectory of {int(lengths.max())} steps does not fit {steps} rows")
        inside = np.arange(len(rows)) < held[:, None]
        values[path] = rows.swapaxes(0, 1)[inside]
    return writer.append_many(values, lengths=lengths, **columns)
