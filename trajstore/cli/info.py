"""``trajstore info``."""

from __future__ import annotations

import time
from typing import Any

import click

from trajstore.cli.formats import store_of
from trajstore.cli.options import json_option, store_argument
from trajstore.cli.output import duration, number, print_json, print_pairs, print_table, size


@click.command()
@store_argument
@json_option
def info(store: str | None, ckpt_dir: str | None, as_json: bool) -> None:
    """Show what a store holds, its size and rate, and whether it is being written.

    STORE is a store's folder, or a folder of stores (one for each collector). Exit status 1 if there is none.

    \b
    Example:
      trajstore info run.zarr
      trajstore info --ckpt_dir run.zarr --json
    """
    from trajstore.operations.info import info as describe

    found = describe(store_of(store, ckpt_dir))
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: Any) -> None:
    click.echo(found.path)
    print_pairs(_summary(found), indent="  ")
    if len(found.parts) > 1:
        click.echo("\nparts")
        print_table(
            ["path", "trajectories", "steps", "files", "disk", "commit", "age", "writer"],
            [
                [
                    part.path,
                    number(part.trajectories),
                    number(part.steps),
                    part.files,
                    size(part.bytes_disk),
                    part.commit,
                    duration(part.age),
                    _writer(part.writer),
                ]
                for part in found.parts
            ],
            indent="  ",
        )
    click.echo("\nfields")
    print_table(
        ["name", "dtype", "stored as", "row shape", "clock", "rows", "raw", "disk", "ratio", "codec"],
        [
            [
                field.name,
                field.dtype,
                field.stored,
                "×".join(map(str, field.shape)) or "scalar",
                field.clock,
                number(field.rows),
                size(field.bytes_raw),
                size(field.bytes_disk),
                _ratio(field.ratio),
                field.codec,
            ]
            for field in found.fields
        ],
        indent="  ",
    )
    click.echo("\nclocks")
    print_table(
        ["name", "against steps", "rows", "fields"],
        [
            [clock.name, clock.relation.replace("_", " "), number(clock.rows), ", ".join(clock.fields)]
            for clock in found.clocks
        ],
        indent="  ",
    )
    click.echo("\ncolumns")
    print_table(
        ["name", "dtype", "default", "disk"],
        [[column.name, column.dtype, column.default, size(column.bytes_disk)] for column in found.columns],
        indent="  ",
    )
    for title, values in (
        ("config", found.config),
        ("files of the config", found.config_files),
        ("state", found.state),
    ):
        if values:
            click.echo(f"\n{title}")
            print_pairs(values.items(), indent="  ")
    if found.config_differs:
        click.echo("\nthe parts were collected under different configurations; this is the first one's")
    for change in found.forced:
        click.echo(f"\nconfig changed by force at {_when(change['time'])}")
        differences = [[key, old, new] for key, (old, new) in change["differences"].items()]
        print_table(["key", "before", "after"], differences, indent="  ")


def _summary(found: Any) -> list[tuple[str, Any]]:
    count = number(found.trajectories)
    if found.target is not None:
        count += f" of {number(found.target)}" + (f", {number(found.remaining)} to go" if found.remaining else "")
    if found.deleted:
        count += f" ({number(found.deleted)} deleted)"
    lengths = number(found.steps)
    if found.trajectories:
        lengths += f" ({found.length_min} to {found.length_max} a trajectory, mean {found.length_mean:.1f})"
    seeds = f"{number(found.seeds_attempted)} attempted, {number(found.seeds_completed)} completed"
    if found.current_seed is not None:
        seeds += f", current seed {found.current_seed}"
    disk = f"{size(found.bytes_disk)} on disk in {sum(part.files for part in found.parts)} files"
    if found.ratio:
        disk += f", {size(found.bytes_raw)} in memory: {_ratio(found.ratio)}"
    last = min(found.parts, key=lambda part: part.age)
    lines = [
        ("trajectories", count),
        ("steps", lengths),
        ("seeds", seeds),
        ("size", disk),
        ("last commit", f"number {last.commit}, {duration(max(last.age, 0))} ago ({_when(last.committed)})"),
    ]
    if found.rate_trajectories:
        rate = f"{number(found.rate_trajectories)} trajectories/s, {number(found.rate_steps or 0)} steps/s"
        lines.append(("rate", f"{rate} in the last session"))
    alive = sum(part.writer is not None for part in found.parts)
    lines.append(("writer", _writer(last.writer) if len(found.parts) == 1 else f"{alive} of {len(found.parts)} alive"))
    lines.append(("format", f"{found.format}, written by {last.software}, created {_when(last.created)}"))
    return lines


def _writer(writer: Any) -> str:
    if writer is None:
        return "none"
    if "pid" not in writer:
        return "alive"
    return f"alive: process {writer['pid']} on {writer.get('host', 'another host')}"


def _ratio(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
