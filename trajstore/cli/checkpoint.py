"""``trajstore ckpt`` and ``trajstore runs``."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import click

from trajstore.cli.options import json_option, option
from trajstore.cli.output import print_json, print_pairs, print_table, size

_DAMAGE = 3


@click.group("ckpt", context_settings={"help_option_names": ["-h", "--help"]})
def checkpoint_group() -> None:
    """List, find, keep, compare and clean up training checkpoints.

    DIR is a folder that trajstore.checkpoint.Checkpoints fills, or one of RLlib scripts (checkpoint_000010/), NavRL
    (checkpoint_10.pt, .pt.lz4), OpenRL or Stable-Baselines3 (name_1000_steps): those are worked on in place.

    \b
    Example:
      trajstore ckpt ls ckpts
      python evaluate.py $(trajstore ckpt path ckpts best)
    """


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@option("-d", "--detailed", is_flag=True, help="All metrics, sizes, sections, notes and versions.")
@option("-m", "--metric", "metrics", multiple=True, help="Show this metric (nested ones as eval/reward).")
@json_option
def ls(folder: str, detailed: bool, metrics: tuple[str, ...], as_json: bool) -> None:
    """List checkpoints: step, date, metrics, size, and why each stays.

    \b
    Example:
      trajstore ckpt ls ckpts --detailed
    """
    from trajstore.checkpoint.listing import list_checkpoints

    listing = list_checkpoints(folder, metrics)
    if as_json:
        print_json(listing)
        return
    if detailed:
        for row in listing.rows:
            _print_detail(row)
    else:
        names = list(metrics) or _common_metrics(listing)
        columns = [_column([row.checkpoint for row in listing.rows], name) for name in names]
        table = [
            [row.checkpoint.step, _date(row.checkpoint.time), *values, size(row.disk_bytes),
             ", ".join(row.kept) or "-", _tags(row)]
            for row, *values in zip(listing.rows, *columns)
        ]  # fmt: skip
        print_table(["step", "date", *names, "size", "kept because", ""], table)
    click.echo()
    summary = [("checkpoints", len(listing.rows)), ("disk", size(listing.disk_bytes)), ("latest", listing.latest)]
    if listing.episodes is not None:
        summary.append(("episodes", f"{listing.episodes:,.0f}"))
    print_pairs(summary)
    for name in listing.damaged:
        click.echo(f"damaged: {name}", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which", default="latest")
@option("-m", "--metric", help="The metric that says which is best.")
@option("--mode", type=click.Choice(["max", "min"]), default="max", show_default=True)
@option("--pick", is_flag=True, help="Choose from a list; Enter takes the latest.")
def path(folder: str, which: str, metric: str | None, mode: str, pick: bool) -> None:
    """Print the path of a checkpoint, for other commands. WHICH is best, latest, a step or a name.

    \b
    Example:
      python demo.py $(trajstore ckpt path ckpts --pick)
    """
    from trajstore.checkpoint.listing import checkpoint_path, list_checkpoints
    from trajstore.checkpoint.retention import metric_names

    rows = list_checkpoints(folder).rows if pick else ()
    for number, row in enumerate(rows, 1):
        names = metric_names(row.checkpoint.metrics)[:3]
        metrics = "  ".join(f"{name} {_metric(row.checkpoint, name)}" for name in names)
        line = f"{number:4d}  step {row.checkpoint.step}  {_date(row.checkpoint.time)}  {metrics}  {_tags(row)}"
        click.echo(line.rstrip(), err=True)
    if rows:
        choice = click.prompt(
            "Number", default=len(rows), type=click.IntRange(1, len(rows)), err=True, show_default=True
        )
        which = rows[choice - 1].checkpoint.name
    click.echo(checkpoint_path(folder, which, metric, mode))


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which")
@option("--off", is_flag=True, help="Let the rules decide again.")
def pin(folder: str, which: str, off: bool) -> None:
    """Keep a checkpoint whatever the rules say. Works while a run saves there.

    \b
    Example:
      trajstore ckpt pin ckpts best
    """
    from trajstore.checkpoint.listing import pin as set_pin

    checkpoint = set_pin(folder, which, pinned=not off)
    click.echo(f"{checkpoint.name} is {'pinned' if checkpoint.pinned else 'no longer pinned'}", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which")
@click.argument("text")
def note(folder: str, which: str, text: str) -> None:
    """Write something down about a checkpoint; `ls --detailed` shows it.

    \b
    Example:
      trajstore ckpt note ckpts 25000000 "first that opens the door"
    """
    from trajstore.checkpoint.listing import note as set_note

    click.echo(f"noted on {set_note(folder, which, text).name}", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which", nargs=-1, required=True)
@option("-o", "--out", help="Where the tar files go; DIR/archive by default.")
@option("--keep", is_flag=True, help="Copy only: remove nothing.")
def archive(folder: str, which: tuple[str, ...], out: str | None, keep: bool) -> None:
    """Put checkpoints away as one tar file each, read back before they are removed.

    \b
    Example:
      trajstore ckpt archive ckpts 1000000 2000000 --out /mnt/cold
    """
    from trajstore.checkpoint.archiving import archive_checkpoints

    for made in archive_checkpoints(folder, which, out, remove=not keep):
        click.echo(made)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("left")
@click.argument("right")
@json_option
def diff(folder: str, left: str, right: str, as_json: bool) -> None:
    """Compare two checkpoints: metrics, values, and how far each tensor moved.

    \b
    Example:
      trajstore ckpt diff ckpts 1000000 best
    """
    from trajstore.checkpoint.difference import diff_checkpoints

    found, equal = diff_checkpoints(folder, left, right)
    if as_json:
        print_json({"differences": found, "equal": equal})
        return
    rows = []
    for difference in found:
        moved = (
            ""
            if difference.largest is None
            else f"largest {difference.largest:.3g}, relative {difference.relative:.3g}"
        )
        pair = difference.left if moved else f"{_value(difference.left)} → {_value(difference.right)}"
        rows.append([difference.path, pair, moved])
    print_table(["what", "value", "moved by"], rows)
    click.echo(f"\n{len(found)} differ, {equal} are equal", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which", required=False)
@json_option
def verify(folder: str, which: str | None, as_json: bool) -> None:
    """Check every byte of one checkpoint, or of all. Exit status 3 if something is damaged.

    \b
    Example:
      trajstore ckpt verify ckpts
    """
    from trajstore.checkpoint.listing import verify as verify_folder

    problems = verify_folder(folder, which)
    if as_json:
        print_json([{"name": name, "problem": problem} for name, problem in problems])
    for name, problem in () if as_json else problems:
        click.echo(f"{name}: {problem}")
    if problems:
        raise click.exceptions.Exit(_DAMAGE)
    click.echo("all is well", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("which")
@click.argument("target")
@option("-s", "--section", default="", help="A part: model, or deeper: model/encoder.")
def export(folder: str, which: str, target: str, section: str) -> None:
    """Write a checkpoint as one .pt or .safetensors file.

    \b
    Example:
      trajstore ckpt export ckpts best policy.safetensors --section model
    """
    from trajstore.checkpoint.exporting import export_checkpoint

    click.echo(export_checkpoint(folder, which, target, section))


@checkpoint_group.command("import")
@click.argument("source")
@click.argument("target", metavar="DIR")
@json_option
def import_(source: str, target: str, as_json: bool) -> None:
    """Take over another program's checkpoints into a folder of ours. Can be run again after a kill.

    \b
    Example:
      trajstore ckpt import old/checkpoints ckpts
    """
    from trajstore.checkpoint.importing import import_checkpoints

    done = import_checkpoints(source, target)
    if as_json:
        print_json(done)
    else:
        click.echo(f"{len(done.taken)} taken over, {len(done.present)} were there", err=True)
    for name, problem in done.failed:
        click.echo(f"not taken over: {name}: {problem}", err=True)
    if done.failed:
        raise click.exceptions.Exit(_DAMAGE)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@option("--keep-last", type=click.IntRange(min=1), help="The newest so many.")
@option("--keep-best", multiple=True, metavar="METRIC[:max|min[:N]]", help="The N best by a metric; may be repeated.")
@option("--keep-every", metavar="STEPS", help="The first at or after each multiple of so many steps: 500k, 25M.")
@option("--keep", metavar="STEPS", help="Exactly these steps: 25M,50M.")
@option("--damaged", is_flag=True, help="Also remove what cannot be read.")
@option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(
    folder: str,
    keep_last: int | None,
    keep_best: tuple[str, ...],
    keep_every: str | None,
    keep: str | None,
    damaged: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove all checkpoints that no rule keeps. Pinned ones stay, and the newest that verifies.

    \b
    Example:
      trajstore ckpt prune ckpts --keep-last 5 --keep-best reward_mean --keep 25M,50M --dry-run
    """
    from trajstore.checkpoint.listing import parse_best, parse_steps
    from trajstore.checkpoint.listing import prune as prune_folder
    from trajstore.errors import SchemaError

    try:
        every = parse_steps(keep_every) if keep_every else [None]
        best = [parse_best(rule) for rule in keep_best]
        steps = parse_steps(keep) if keep else []
    except SchemaError as error:
        raise click.UsageError(str(error)) from error
    pruned = prune_folder(folder, keep_last, best, every[0], steps, damaged=damaged, dry_run=dry_run)
    if as_json:
        print_json(pruned)
        return
    for checkpoint in pruned.removed:
        click.echo(checkpoint.name)
    for name in pruned.damaged:
        click.echo(name)
    count = len(pruned.removed) + len(pruned.damaged)
    click.echo(f"{count} {'would go' if dry_run else 'removed'}, {len(pruned.kept)} kept", err=True)


@checkpoint_group.command()
@click.argument("folder", metavar="DIR")
@click.argument("target")
@option("-m", "--metric", "metrics", multiple=True, help="A panel for this metric; without any, what was recorded.")
def plot(folder: str, target: str, metrics: tuple[str, ...]) -> None:
    """Plot the metrics history as .png, .svg or .pdf.

    Without --metric: rewards, rewards by role, episode length, KL, entropy and the latest values, where most of them
    were recorded; else a panel for each metric there is.

    \b
    Example:
      trajstore ckpt plot ckpts training.png
    """
    from trajstore.checkpoint.plot import plot_folder

    click.echo(plot_folder(folder, target, metrics))


@click.group("runs", context_settings={"help_option_names": ["-h", "--help"]})
def runs_group() -> None:
    """List and compare the runs that trajstore.run.run_dir made.

    \b
    Example:
      trajstore runs ls results
    """


@runs_group.command("ls")
@click.argument("root")
@json_option
def runs_ls(root: str, as_json: bool) -> None:
    """List runs: status, duration, latest step, result, source revision, notes.

    \b
    Example:
      trajstore runs ls results
    """
    from trajstore.run import list_runs

    runs = list_runs(root)
    if as_json:
        print_json(runs)
        return
    rows = [
        [run.name, run.status, _duration(run.duration), run.step, run.result, run.revision,
         run.host, "; ".join(run.notes)]
        for run in runs
    ]  # fmt: skip
    print_table(["run", "status", "duration", "step", "result", "revision", "host", "notes"], rows)


@runs_group.command("diff")
@click.argument("left")
@click.argument("right")
@json_option
def runs_diff(left: str, right: str, as_json: bool) -> None:
    """What differs between two runs: configuration, files, source, versions, result.

    \b
    Example:
      trajstore runs diff results/20261120T061300Z-a results/20261120T071300Z-b
    """
    from trajstore.run import diff_runs

    found = diff_runs(left, right)
    if as_json:
        print_json({name: {"left": pair[0], "right": pair[1]} for name, pair in found.items()})
    else:
        print_table(["what", "left", "right"], [[name, _value(a), _value(b)] for name, (a, b) in found.items()])


def _common_metrics(listing: Any) -> list[str]:
    """The metrics most checkpoints have, at most four; what is counted in the summary is left out."""
    from trajstore.checkpoint.retention import metric_names

    counts: dict[str, int] = {}
    for row in listing.rows:
        for name in metric_names(row.checkpoint.metrics):
            counts[name] = counts.get(name, 0) + 1
    order = list(counts)
    return sorted(counts, key=lambda name: (-counts[name], order.index(name)))[:4]


def _column(checkpoints: list[Any], name: str) -> list[str | None]:
    """A metric of each checkpoint, with as many decimals in all, so that they can be compared down the column."""
    from trajstore.checkpoint.retention import metric_value

    values = [metric_value(checkpoint.metrics, name) for checkpoint in checkpoints]
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest, smallest = max(finite, default=0.0), min((value for value in finite if value), default=1.0)
    if all(value.is_integer() for value in finite):
        decimals = 0
    else:
        decimals = max(0, 4 - math.floor(math.log10(largest)))
    form = f".{decimals}f" if largest < 1e9 and smallest >= 10.0**-decimals else ".5g"
    return [None if value is None else format(value, form) for value in values]


def _metric(checkpoint: Any, name: str) -> str | None:
    from trajstore.checkpoint.retention import metric_value

    value = metric_value(checkpoint.metrics, name)
    return None if value is None else f"{value:.6g}"


def _tags(row: Any) -> str:
    checkpoint = row.checkpoint
    flags = {"BEST": row.best, "FINAL": checkpoint.final, "INTERRUPTED": checkpoint.interrupted,
             "PINNED": checkpoint.pinned, "MILESTONE": not checkpoint.complete}  # fmt: skip
    return " ".join(f"[{name}]" for name, on in flags.items() if on)


def _print_detail(row: Any) -> None:
    checkpoint = row.checkpoint
    click.echo(f"step {checkpoint.step} {_tags(row)}".rstrip())
    pairs: list[tuple[str, Any]] = [
        ("path", checkpoint.path),
        ("date", _date(checkpoint.time)),
        ("kept because", ", ".join(row.kept) or None),
        ("size", f"{size(row.disk_bytes)} on disk, {size(checkpoint.stored_bytes)} with links, "
                 f"{size(checkpoint.raw_bytes)} before compression"),
        ("sections", ", ".join(checkpoint.sections) or None),
        ("note", checkpoint.note or None),
        *((name, value) for name, value in checkpoint.metrics.items()),
        *((f"version of {name}", value) for name, value in checkpoint.versions.items()),
    ]  # fmt: skip
    print_pairs([pair for pair in pairs if pair[1] is not None], indent="  ")
    click.echo()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
