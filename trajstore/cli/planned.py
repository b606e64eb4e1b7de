"""A plan on the terminal: what will be linked and encoded, before anything is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from trajstore.cli.output import number, print_table, size


def show_plan(title: str, summary: Mapping[str, Any], *, err: bool) -> None:
    """Print a ``Plan.summary()``; to stderr when it only precedes the result."""
    click.echo(
        f"{title}: {number(summary['trajectories'])} trajectories, {number(summary['steps'])} steps "
        f"from {_stores(summary['stores'])}; {size(summary['linked_bytes'])} in "
        f"{number(summary['linked_shards'])} files linked, {size(summary['encoded_raw_bytes'])} (raw) encoded anew",
        err=err,
    )
    for note in summary["notes"]:
        click.echo(f"  note: {note}", err=err)


def show_fields(summary: Mapping[str, Any]) -> None:
    """Print what becomes of each field."""
    rows = [
        (
            path,
            entry["linked_shards"],
            size(entry["linked_bytes"]),
            entry["encoded_shards"],
            size(entry["encoded_raw_bytes"]),
        )
        for path, entry in summary["fields"].items()
    ]
    print_table(("field", "linked files", "bytes", "encoded files", "raw bytes"), rows, indent="  ")


def _stores(count: int) -> str:
    return "1 store" if count == 1 else f"{number(count)} stores"
