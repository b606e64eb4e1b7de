"""``trajstore demo``."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import click

from trajstore.cli import DAMAGE
from trajstore.cli.options import json_option, option
from trajstore.cli.output import number, print_json, size


@click.command()
@click.argument("folder", required=False)
@option("--env", help="A Gymnasium environment with discrete actions; Atari Breakout if ale-py is installed.")
@option("--episodes", type=click.IntRange(min=1), default=32, show_default=True, help="To collect.")
@option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Environments side by side.")
@option("--kills", type=click.IntRange(min=0), default=3, show_default=True, help="Times the collector is killed.")
@option("--rerun", type=click.IntRange(min=0), default=6, show_default=True, help="Episodes played again to compare.")
@option("--seed", type=int, help="Of the moments of the kills; by default another each time.")
@option("--vector", is_flag=True, help="Train a small policy in 32 environments instead, and record every step.")
@json_option
@click.pass_context
def demo(
    ctx: click.Context,
    folder: str | None,
    env: str | None,
    episodes: int,
    workers: int,
    kills: int,
    rerun: int,
    seed: int | None,
    vector: bool,
    as_json: bool,
) -> None:
    """Collect, kill -9, resume, check, slice and export, in under a minute.

    FOLDER is a new folder for the store and the export, a temporary one by default; it is kept, to be looked at.
    Exit status 3 if anything that was acknowledged is lost or changed.

    \b
    Example:
      trajstore demo
      trajstore demo my-demo --episodes 200 --kills 10
      trajstore demo ppo.zarr --vector
    """
    if vector:
        _train(folder, as_json)
        return
    from trajstore.demo import run

    live = sys.stderr.isatty() and not as_json

    def counted(done: int, total: int) -> None:
        if live:
            click.echo(f"\r{'':9}{done} of {total} episodes acknowledged ", nl=False, err=True)

    def say(title: str, text: str) -> None:
        if live:
            click.echo("\r\x1b[K", nl=False, err=True)
        if not as_json:
            click.echo(f"{title:9}{text}")

    report = run(
        folder,
        env=env,
        episodes=episodes,
        workers=workers,
        kills=kills,
        rerun=rerun,
        seed=seed,
        say=say,
        counted=counted,
    )
    if as_json:
        print_json(report)
    else:
        raw, disk = size(report.bytes_raw), size(report.bytes_disk)
        times = "once" if kills == 1 else f"{kills} times"
        click.echo(
            f"\n{number(report.steps)} steps, {raw} of arrays in {disk} on disk. Killed {times}, "
            + ("nothing lost." if report.ok else "AND SOMETHING IS WRONG.")
            + f" {report.seconds:.0f} s."
        )
        by_name = os.path.basename(sys.argv[0]) == "trajstore"
        me = "trajstore" if shutil.which("trajstore") else sys.argv[0] if by_name else "python -m trajstore.cli"
        click.echo(f"\nLook around:\n  {me} info {report.store}\n  {me} ls {report.store} --sort return -r -n 5")
    if not report.ok:
        ctx.exit(DAMAGE)


def _train(folder: str | None, as_json: bool) -> None:
    """The collector of docs/collect.md, and what it has recorded."""
    from trajstore.vectordemo import run

    report = run(folder or os.path.join(tempfile.mkdtemp(prefix="trajstore-demo."), "ppo.zarr"))
    if as_json:
        print_json(report)
        return
    first, last = report["mean_length"]
    click.echo(report["summary"].strip())
    click.echo(
        f"\n{number(report['trajectories'])} episodes, {number(report['steps'])} steps; the mean length of an episode "
        f"went from {first:.0f} to {last:.0f} steps.\nRecording took {100 * report['record_share']:.1f} % of the time "
        f"of stepping and recording.\n\nLook around:\n  trajstore info {report['path']}"
    )
