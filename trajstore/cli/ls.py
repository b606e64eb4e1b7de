"""``trajstore ls``."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from trajstore.cli.formats import store_of
from trajstore.cli.options import json_option, option, store_argument, usage
from trajstore.cli.output import print_columns, print_json_list


@click.command()
@store_argument
@option("-w", "--where", help="Only trajectories for which this holds, e.g. 'success & (length > 50)'.")
@option("-s", "--sort", metavar="COLUMN", help="Sort by a column, smallest first.")
@option("-r", "--reverse", is_flag=True, help="The other way round.")
@option("-n", "--limit", type=click.IntRange(min=0), help="At most so many.")
@option("-c", "--columns", metavar="NAMES", help="Which columns, separated by commas; by default all.")
@json_option
def ls(
    store: str | None,
    ckpt_dir: str | None,
    where: str | None,
    sort: str | None,
    reverse: bool,
    limit: int | None,
    columns: str | None,
    as_json: bool,
) -> None:
    """List trajectories: filtered, sorted, with the columns you choose.

    The first column is the number under which Python finds a trajectory: trajstore.open(STORE)[number].

    \b
    Example:
      trajstore ls run.zarr --where "success & (length > 50)" --sort return --reverse --limit 10
    """
    from trajstore.dataset import open as open_dataset
    from trajstore.errors import NotFoundError, SchemaError

    dataset = open_dataset(store_of(store, ckpt_dir))
    names = list(dataset.table)
    try:
        chosen = np.arange(len(dataset)) if where is None else dataset.matching(where)
    except (SchemaError, NotFoundError) as error:
        raise usage(f"--where: {error.message}") from error
    wanted = names if columns is None else [name.strip() for name in columns.split(",")]
    for name in [*wanted, *([] if sort is None else [sort])]:
        if name not in names:
            raise usage(f"there is no column {name!r}; there are {', '.join(names)}")
    if sort is not None:
        chosen = chosen[_ascending(dataset[chosen].table[sort])]
    if reverse:
        chosen = chosen[::-1]
    chosen = chosen[:limit]
    table = dataset[chosen].table
    values = {"index": chosen, **{name: table[name] for name in wanted}}
    if as_json:
        print_json_list({name: column[i] for name, column in values.items()} for i in range(len(chosen)))
    else:
        print_columns(values)


def _ascending(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The order of values, texts that are not there last."""
    if values.dtype != object:
        return np.argsort(values, kind="stable")
    return np.array(sorted(range(len(values)), key=lambda i: (values[i] is None, values[i] or "")), np.int64)
