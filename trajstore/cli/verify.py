"""``trajstore verify``."""

from __future__ import annotations

from typing import Any

import click

from trajstore.cli import DAMAGE
from trajstore.cli.formats import store_of
from trajstore.cli.options import json_option, option, progress_option, store_argument
from trajstore.cli.output import number, print_json, progress_bar, size


@click.command()
@store_argument
@option("--deep", is_flag=True, help="Also decode every chunk, string and document.")
@option("--threads", type=click.IntRange(min=1), help="Checked side by side; by default one for each core.")
@option("--all", "everything", is_flag=True, help="Name every damaged trajectory, not the first twenty of each file.")
@progress_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    store: str | None,
    ckpt_dir: str | None,
    deep: bool,
    threads: int | None,
    everything: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Check every checksum, and name the trajectories that are damaged.

    Writes nothing; the store may be open for writing meanwhile. Exit status 3 if anything is damaged.

    \b
    Example:
      trajstore verify run.zarr
      trajstore verify run.zarr --deep --json
    """
    from trajstore.operations.verify import verify as check

    path = store_of(store, ckpt_dir)
    with progress_bar("verify", hidden=no_progress or as_json) as progress:
        report = check(path, deep=deep, threads=threads, progress=progress)
    if as_json:
        print_json(report)
    else:
        for found in report.stores:
            _print(found, None if everything else 20)
    if not report.ok:
        ctx.exit(DAMAGE)


def _print(found: Any, limit: int | None) -> None:
    click.echo(found.store)
    for damage in found.damages:
        lines = damage.lines()
        for line in lines[:limit]:
            click.echo(f"  DAMAGED  {line}")
        if limit is not None and len(lines) > limit:
            click.echo(f"  DAMAGED  … and {number(len(lines) - limit)} more trajectories by the same cause (--all)")
    checked = f"{number(found.files)} files, {size(found.bytes)}, {number(found.chunks)} chunks"
    if found.ok:
        click.echo(
            f"  whole: {number(found.trajectories)} trajectories, {number(found.steps)} steps as commit {found.commit} "
            f"left them ({checked})"
        )
    else:
        whole = found.trajectories - len(found.damaged_trajectories)
        click.echo(f"  {number(whole)} of {number(found.trajectories)} trajectories are whole ({checked} checked)")
        click.echo("  hint: `trajstore repair` saves what is whole into a new store", err=True)
    if found.orphans or found.temporaries:
        count = found.orphans + found.temporaries
        amount = size(found.orphan_bytes + found.temporary_bytes)
        click.echo(
            f"  {number(count)} files ({amount}) that no commit names, left by writers that were killed: no damage"
        )
