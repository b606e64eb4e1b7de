"""``trajstore compact``."""

from __future__ import annotations

import click

from trajstore.cli.options import json_option, option, progress_option
from trajstore.cli.output import number, print_json, progress_bar
from trajstore.cli.planned import show_fields, show_plan


@click.command()
@click.argument("source")
@click.argument("destination")
@option("--codec", type=click.Choice(["fast", "balanced", "small"]), default="small", help="By default small.")
@option("--chunk-bytes", type=click.IntRange(min=1), metavar="N", help="Raw bytes of a chunk; by default 262144.")
@option("--shard-bytes", type=click.IntRange(min=1), metavar="N", help="Raw bytes of a file; by default 33554432.")
@option("--dask", "dask", metavar="ADDRESS", help="Make files on the cluster of this Dask scheduler, tcp://HOST:PORT.")
@option("--dry-run", "dry_run", is_flag=True, help="Print the plan and its bytes; write nothing.")
@progress_option
@json_option
def compact(
    source: str,
    destination: str,
    codec: str,
    chunk_bytes: int | None,
    shard_bytes: int | None,
    dask: str | None,
    dry_run: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Write a store anew, without gaps and deleted trajectories.

    SOURCE is only read. DESTINATION must not exist; it appears whole or not at all.

    \b
    Example:
      trajstore compact run.zarr cold.zarr
      trajstore compact run.zarr quick.zarr --codec fast --chunk-bytes 16384
    """
    from trajstore.operations.assembly import located, refuse_existing
    from trajstore.operations.compact import CHUNK_BYTES, SHARD_BYTES, plan_compact
    from trajstore.operations.tasks import connected

    refuse_existing(*located(destination))
    planned = plan_compact(
        source, codec=codec, chunk_bytes=chunk_bytes or CHUNK_BYTES, shard_bytes=shard_bytes or SHARD_BYTES
    )
    summary = planned.summary()
    if not as_json:
        show_plan(destination, summary, err=not dry_run)
        if dry_run:
            show_fields(summary)
    if not dry_run:
        with progress_bar("compact", hidden=no_progress or as_json) as progress, connected(dask) as client:
            planned.write(destination, client=client, report=progress)
    if as_json:
        print_json({"destination": destination, **summary})
    elif not dry_run:
        click.echo(f"{number(summary['trajectories'])} trajectories -> {destination}")
