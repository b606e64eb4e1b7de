"""The table of trajectories as Parquet or Arrow (Feather): a row for each, ``length`` and strings among the columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from trajstore.dataset import Dataset
from trajstore.engine.optional import optional
from trajstore.errors import SchemaError
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import chosen

CARRIES = {"table": Carriage(strings=KEPT, columns=KEPT)}


def export_table(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write ``.parquet``, or ``.arrow`` / ``.feather``. ``fields`` : columns to write, by default all.

    The fields' rows are not in it: their names are in the warnings.
    """
    pyarrow = optional("pyarrow", "interchange")
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in (".parquet", ".arrow", ".feather"):
        raise SchemaError(f"{os.fspath(path)} names no table format", hint="end it with .parquet, .arrow or .feather")
    table = dataset.table
    names = chosen(dataset, fields, table)
    columns = {name: pyarrow.array(table[name]) for name in counted(names, progress, len(names))}
    with made_aside(path) as aside:
        found = pyarrow.table(columns)
        if suffix == ".parquet":
            optional("pyarrow.parquet", "interchange").write_table(found, aside, compression="zstd")
        else:
            optional("pyarrow.feather", "interchange").write_feather(found, aside)
    left = [name for name in dataset.fields if name not in names]
    warnings = (f"rows of fields left out: {', '.join(left)}",) if left else ()
    return Exported(len(dataset), int(dataset.lengths.sum()), warnings)
