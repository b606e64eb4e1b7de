"""``trajstore repair``."""

from __future__ import annotations

import time

import click

from trajstore.cli.formats import store_of
from trajstore.cli.options import json_option, option, progress_option, usage
from trajstore.cli.output import number, print_json, print_table, progress_bar


@click.command()
@click.argument("store", type=click.Path())
@click.argument("destination", required=False, type=click.Path())
@option("--commit", type=click.IntRange(min=1), metavar="N", help="Read the store as its kept commit N left it.")
@option("--dry-run", "dry_run", is_flag=True, help="Print what is whole; write nothing.")
@progress_option
@json_option
def repair(
    store: str, destination: str | None, commit: int | None, dry_run: bool, no_progress: bool, as_json: bool
) -> None:
    """Save what is whole of a damaged store into a new one.

    Without DESTINATION: list the manifests in the store, and which of them can be opened. STORE is only read;
    DESTINATION must not exist, and appears whole or not at all.

    \b
    Example:
      trajstore repair run.zarr
      trajstore repair run.zarr saved.zarr
      trajstore repair run.zarr saved.zarr --commit 41
    """
    from trajstore.operations.assembly import located, refuse_existing
    from trajstore.operations.repair import kept, plan_repair

    if commit is not None and destination is None and not dry_run:
        raise usage("--commit is for a DESTINATION, or --dry-run")
    path = store_of(store, None)
    if destination is None and not dry_run:
        found = kept(path)
        if as_json:
            print_json(found)
            return
        rows = [
            (
                entry.file,
                entry.number or "-",
                _when(entry.time),
                number(entry.trajectories or 0),
                entry.error or "opens",
            )
            for entry in found
        ]
        print_table(("file", "commit", "time (UTC)", "trajectories", "state"), rows)
        return
    if destination is not None:
        refuse_existing(*located(destination))
    with progress_bar("verify", hidden=no_progress or as_json) as progress:
        planned = plan_repair(path, commit=commit, progress=progress)
    if destination is not None and not dry_run:
        planned.write(destination)
    whole, lost = len(planned.whole), len(planned.lost)
    if as_json:
        print_json({"whole": planned.whole.tolist(), "lost": planned.lost.tolist(), "destination": destination})
        return
    if lost:
        names = ", ".join(str(n) if n >= 0 else "?" for n in planned.lost[:20].tolist())
        click.echo(f"  not whole, ids: {names}{', …' if lost > 20 else ''}")
    where = f" -> {destination}" if destination is not None and not dry_run else ""
    click.echo(f"{number(whole)} of {number(whole + lost)} trajectories are whole{where}")


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
