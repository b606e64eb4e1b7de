"""``trajstore split``."""

from __future__ import annotations

from typing import Any

import click

from trajstore.cli.options import json_option, option, progress_option, usage
from trajstore.cli.output import number, print_json, progress_bar
from trajstore.cli.planned import show_fields, show_plan


@click.command()
@click.argument("source")
@click.argument("destination")
@option("--first", type=click.IntRange(min=0), help="The first so many, and the rest.")
@option("--fractions", metavar="NAME=F,...", help="Parts of the whole, e.g. train=0.9,test=0.1.")
@option("-w", "--where", help="Those for which this holds, and the rest.")
@option("--by", metavar="COLUMN", help="A part for each value of a column.")
@option("--parts", type=click.IntRange(min=1), help="So many blocks, rank0, rank1, …")
@option("--seed", type=int, help="Draw at random instead of from the front.")
@option("--strict", is_flag=True, help="Let no bytes of other trajectories travel along with a part.")
@option("--rewrite", is_flag=True, help="Encode everything anew, without gaps.")
@option("--codec", type=click.Choice(["fast", "balanced", "small"]), help="Of rewritten stores.")
@option("--dask", "dask", metavar="ADDRESS", help="Make files on the cluster of this Dask scheduler, tcp://HOST:PORT.")
@option("--copy", is_flag=True, help="Copy files that could be linked.")
@option("--dry-run", "dry_run", is_flag=True, help="Print the plan and its bytes; write nothing.")
@progress_option
@json_option
def split(
    source: str,
    destination: str,
    first: int | None,
    fractions: str | None,
    where: str | None,
    by: str | None,
    parts: int | None,
    seed: int | None,
    strict: bool,
    rewrite: bool,
    codec: str | None,
    dask: str | None,
    copy: bool,
    dry_run: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Split a store into several, each trajectory into exactly one.

    SOURCE is only read. DESTINATION is a folder that must not exist; it appears with all parts in it or not at all.

    \b
    Example:
      trajstore split all.zarr parts --fractions train=0.9,test=0.1 --seed 0
      trajstore split all.zarr parts --first 1000
    """
    from trajstore.operations.assembly import located, refuse_existing
    from trajstore.operations.split import plan_split, write_parts
    from trajstore.operations.tasks import connected

    if codec is not None and not rewrite:
        raise usage("--codec is for --rewrite")
    refuse_existing(*located(destination))
    planned = plan_split(
        source,
        first=first,
        fractions=None if fractions is None else _fractions(fractions),
        where=where,
        by=by,
        parts=parts,
        seed=seed,
        strict=strict,
        rewrite=rewrite,
        codec=codec,
    )
    summaries: dict[str, Any] = {name: part.summary() for name, part in planned.items()}
    if not as_json:
        for name, summary in summaries.items():
            show_plan(f"{destination}/{name}", summary, err=not dry_run)
            if dry_run:
                show_fields(summary)
    if not dry_run:
        with progress_bar("split", hidden=no_progress or as_json) as progress, connected(dask) as client:
            write_parts(planned, destination, link=not copy, client=client, report=progress)
    if as_json:
        print_json(summaries)
    elif not dry_run:
        for name, summary in summaries.items():
            click.echo(f"{number(summary['trajectories'])} trajectories -> {destination}/{name}")


def _fractions(text: str) -> dict[str, float]:
    found = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name.strip() in found:
            raise usage(f"--fractions names {name.strip()!r} twice")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise usage(f"--fractions takes NAME=FRACTION,…, not {text!r}") from None
    return found
