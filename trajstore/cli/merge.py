"""``trajstore merge``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from trajstore.cli.options import json_option, option, progress_option, usage
from trajstore.cli.output import number, print_json, progress_bar
from trajstore.cli.planned import show_fields, show_plan


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("destination")
@option("-w", "--where", help="Only trajectories for which this holds, e.g. 'success & (length > 50)'.")
@option("--order", default="source", metavar="ORDER", help="source, interleave, shuffle, or a column (-COLUMN: down).")
@option("--seed", type=int, help="Of --order shuffle; 0 if not given.")
@option("--dedupe", metavar="COLUMN", help="One trajectory for each value of this column.")
@option("--keep", metavar="RULE", help="Which one: first (if not given), last, max:COLUMN or min:COLUMN.")
@option("--fill", multiple=True, metavar="COLUMN=VALUE", help="For stores that lack an integer or bool column.")
@option("--no-provenance", "no_provenance", is_flag=True, help="Add no columns source and source_id.")
@option("--rewrite", is_flag=True, help="Encode everything anew, without gaps, in the new order.")
@option("--codec", type=click.Choice(["fast", "balanced", "small"]), help="Of a rewritten store.")
@option("--dask", "dask", metavar="ADDRESS", help="Make files on the cluster of this Dask scheduler, tcp://HOST:PORT.")
@option("--copy", is_flag=True, help="Copy files that could be linked.")
@option("--move", is_flag=True, help="Verify the new store, then remove the sources. Asks first.")
@option("--yes", is_flag=True, help="Do not ask.")
@option("--dry-run", "dry_run", is_flag=True, help="Print the plan and its bytes; write nothing.")
@progress_option
@json_option
def merge(
    sources: tuple[str, ...],
    destination: str,
    where: str | None,
    order: str,
    seed: int | None,
    dedupe: str | None,
    keep: str | None,
    fill: tuple[str, ...],
    no_provenance: bool,
    rewrite: bool,
    codec: str | None,
    dask: str | None,
    copy: bool,
    move: bool,
    yes: bool,
    dry_run: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Merge stores into a new one, by linking files where they fit.

    SOURCE is a store, a folder of stores, or a pattern; it is only read, and may be open for writing. DESTINATION must
    not exist; it appears whole or not at all.

    \b
    Example:
      trajstore merge runs/rank_* all.zarr
      trajstore merge runs all.zarr --where success --dedupe seed --keep max:return --dry-run
    """
    from trajstore.operations.assembly import located, refuse_existing
    from trajstore.operations.merge import plan_merge
    from trajstore.operations.move import move as move_stores
    from trajstore.operations.tasks import connected

    if codec is not None and not rewrite:
        raise usage("--codec is for --rewrite")
    if keep is not None and dedupe is None:
        raise usage("--keep is for --dedupe")
    if seed is not None and order != "shuffle":
        raise usage("--seed is for --order shuffle")
    options: dict[str, Any] = {
        "where": where,
        "order": order,
        "seed": seed or 0,
        "dedupe": dedupe,
        "keep": keep or "first",
        "fill": filled(fill),
        "provenance": not no_provenance,
        "rewrite": rewrite,
        "codec": codec,
    }
    if move and not dry_run:
        if not yes and not _agreed(sources):
            raise click.Abort
        with progress_bar("merge", hidden=no_progress or as_json) as progress, connected(dask) as client:
            merged = move_stores(list(sources), destination, report=progress, link=not copy, client=client, **options)
        result = {"destination": destination, "trajectories": len(merged), "removed": list(sources)}
        print_json(result) if as_json else click.echo(f"{number(len(merged))} trajectories -> {destination}; moved")
        return
    refuse_existing(*located(destination))
    planned = plan_merge(list(sources), **options)
    summary = planned.summary()
    if dry_run:
        if as_json:
            print_json(summary)
        else:
            show_plan(f"plan of {destination}", summary, err=False)
            show_fields(summary)
        return
    if not as_json:
        show_plan(destination, summary, err=True)
    with progress_bar("merge", hidden=no_progress or as_json) as progress, connected(dask) as client:
        merged = planned.write(destination, link=not copy, client=client, report=progress)
    if as_json:
        print_json({"destination": destination, **summary})
    else:
        click.echo(f"{number(len(merged))} trajectories -> {destination}")


def filled(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``--fill COLUMN=VALUE`` options; a value is a number, true or false."""
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        try:
            value = json.loads(text.lower())
        except ValueError:
            value = None
        if not equals or not isinstance(value, (bool, int, float)):
            raise usage(f"--fill takes COLUMN=VALUE with a number, true or false, not {pair!r}")
        found[name] = value
    return found


def _agreed(sources: tuple[str, ...]) -> bool:
    if not sys.stdin.isatty():
        raise usage("--move removes the sources: confirm with --yes where there is no terminal")
    return click.confirm(f"Remove {', '.join(sources)} when the new store has been verified?", err=True)
