"""``trajstore delete`` and ``trajstore undelete``."""

from __future__ import annotations

import click

from trajstore.cli.options import json_option, one_of, option, store_argument, usage
from trajstore.cli.output import number, print_json

_MOST_IDS = 10_000_000


@click.command()
@store_argument
@option("-w", "--where", help="Those for which this holds, e.g. 'length < 5'.")
@option("--ids", metavar="IDS", help="Those of these ids: 3,7,10-20.")
@option("--dry-run", "dry_run", is_flag=True, help="Say how many there are; delete none.")
@json_option
def delete(
    store: str | None, ckpt_dir: str | None, where: str | None, ids: str | None, dry_run: bool, as_json: bool
) -> None:
    """Delete trajectories by one commit; they can be brought back.

    `undelete` does so, until `compact` writes a store without them.

    \b
    Example:
      trajstore delete run.zarr --where "length < 5"
      trajstore delete run.zarr --ids 3,7,10-20
    """
    from trajstore.dataset import open as open_dataset
    from trajstore.operations.delete import delete as delete_trajectories

    path = one_of("STORE", store, "--ckpt_dir", ckpt_dir)
    wanted = _ids(ids)
    if (where is None) == (wanted is None):
        raise usage("choose trajectories by --where or by --ids")
    if dry_run:
        dataset = open_dataset(path)
        ids_there = set(dataset.table["id"].tolist())
        count = len(dataset.matching(where)) if where is not None else len(ids_there.intersection(wanted or ()))
    else:
        count = delete_trajectories(path, where=where, ids=wanted)
    if as_json:
        print_json({"deleted": count, "dry_run": dry_run})
    else:
        click.echo(f"{number(count)} trajectories {'would be ' if dry_run else ''}deleted")


@click.command()
@store_argument
@option("-w", "--where", help="Those for which this holds.")
@option("--ids", metavar="IDS", help="Those of these ids: 3,7,10-20.")
@option("--all", "everything", is_flag=True, help="All of them.")
@json_option
def undelete(
    store: str | None, ckpt_dir: str | None, where: str | None, ids: str | None, everything: bool, as_json: bool
) -> None:
    """Bring deleted trajectories back.

    \b
    Example:
      trajstore undelete run.zarr --all
    """
    from trajstore.operations.delete import undelete as undelete_trajectories

    path = one_of("STORE", store, "--ckpt_dir", ckpt_dir)
    wanted = _ids(ids)
    if [where is not None, wanted is not None, everything].count(True) != 1:
        raise usage("choose trajectories by --where, by --ids or by --all")
    count = undelete_trajectories(path, where=where, ids=wanted, everything=everything)
    print_json({"undeleted": count}) if as_json else click.echo(f"{number(count)} trajectories brought back")


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise usage(f"--ids takes numbers and spans of them, 3,7,10-20, not {text!r}") from None
        if not 0 < span.stop - span.start <= _MOST_IDS:
            raise usage(f"--ids {piece.strip()} is no span of 1 to {_MOST_IDS:,} ids: choose by --where 'id >= 3'")
        found += span
    return found
