"""What is in a folder of checkpoints, why it stays, and what would go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trajstore.checkpoint.folder import (
    Folder,
    best_of,
    find,
    locked,
    newest_valid,
    open_folder,
    read_rules,
    require_metric,
)
from trajstore.checkpoint.retention import Best, Retention, metric_value, select
from trajstore.checkpoint.shelf import Checkpoint, Shelf, candidate
from trajstore.errors import NotFoundError, SchemaError, TrajstoreError

_EPISODES = ("episodes_completed", "episodes", "num_episodes")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True)
class Row:
    """One line of a listing. kept : the rules that keep it. disk_bytes : on disk, what is linked counted where it was
    first met."""

    checkpoint: Checkpoint
    kept: tuple[str, ...]
    best: bool
    disk_bytes: int


@dataclass(frozen=True)
class Listing:
    """All checkpoints of a folder, in the order of saving, and their sums."""

    path: str
    kind: str
    rows: tuple[Row, ...]
    damaged: tuple[str, ...]
    disk_bytes: int
    latest: int | None
    episodes: float | None


def list_checkpoints(path: str | Path, metrics: Sequence[str] = ()) -> Listing:
    """List a folder. Hard links are counted once.

    Raises ``NotFoundError`` if there is nothing, or if no checkpoint has one of ``metrics``.
    """
    folder = open_folder(path)
    found = folder.checkpoints()
    for metric in metrics:
        require_metric(folder, found, metric)
    best = best_of(folder, found)
    kept = select(map(candidate, found), read_rules(folder.storage))
    seen: set[tuple[int, int]] = set()
    rows = []
    for checkpoint in found:
        size = 0
        for file in folder.files(checkpoint.name):
            try:
                status = file.stat()
            except FileNotFoundError:  # a run that saves here removes what its rules do not keep
                continue
            if status.st_nlink == 1 or (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                size += status.st_size
        reasons = tuple(kept.get(checkpoint.name, ()))
        rows.append(Row(checkpoint, reasons, best is not None and checkpoint.name == best.name, size))
    episodes = None
    for checkpoint in reversed(found):
        episodes = next((v for n in _EPISODES if (v := metric_value(checkpoint.metrics, n)) is not None), None)
        if episodes is not None:
            break
    return Listing(
        path=folder.storage.describe(),
        kind=folder.kind,
        rows=tuple(rows),
        damaged=tuple(folder.damaged()),
        disk_bytes=sum(row.disk_bytes for row in rows),
        latest=found[-1].step if found else None,
        episodes=episodes,
    )


def checkpoint_path(path: str | Path, which: str | int = "latest", metric: str | None = None, mode: str = "max") -> str:
    """The path of a checkpoint: by step, name, ``"latest"`` or ``"best"``. Raises ``NotFoundError``."""
    return find(open_folder(path), which, metric, mode).path


def pin(path: str | Path, which: str | int, *, pinned: bool = True) -> Checkpoint:
    """Keep a checkpoint whatever the rules say, or no longer. Works while a run saves there."""
    folder = open_folder(path)
    checkpoint = find(folder, which)
    Shelf(folder.storage).set_mark(checkpoint.name, pinned=pinned)
    return find(folder, checkpoint.name)


def note(path: str | Path, which: str | int, text: str) -> Checkpoint:
    """Write something down about a checkpoint, in the place of what was written before."""
    folder = open_folder(path)
    checkpoint = find(folder, which)
    Shelf(folder.storage).set_mark(checkpoint.name, note=text)
    return find(folder, checkpoint.name)


def verify(path: str | Path, which: str | int | None = None) -> list[tuple[str, str]]:
    """Check every byte of one checkpoint, or of all. Returns ``[(name, what is wrong)]``."""
    folder = open_folder(path)
    names = [find(folder, which).name] if which is not None else [c.name for c in folder.checkpoints()]
    damaged = folder.damaged() if which is None else []
    problems = []
    for name in [*names, *damaged]:
        try:
            folder.verify(name)
        except TrajstoreError as error:
            problems.append((name, str(error)))
    return problems


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` removed, or would. kept : ``{name: reasons}``."""

    removed: tuple[Checkpoint, ...]
    kept: dict[str, list[str]]
    damaged: tuple[str, ...]


def prune(
    path: str | Path,
    keep_last: int | None = None,
    keep_best: Best | Sequence[Best] = (),
    keep_every: int | None = None,
    keep: Sequence[int] = (),
    *,
    damaged: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Remove all checkpoints that no rule keeps.

    Parameters
    ----------
    keep_last, keep_best, keep_every, keep : see ``Retention``; at least one. Pinned ones stay, and the newest that
        verifies.
    damaged : also remove those whose record cannot be read.
    dry_run : only say what would go.

    Raises
    ------
    SchemaError : no rule. NotFoundError : no checkpoint has a metric of ``keep_best``.
    LockedError : a run saves here. CorruptionError : nothing verifies; nothing is removed.
    """
    rules = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, keep=tuple(keep))
    if rules.keeps_all and not damaged:
        raise SchemaError("no rule says what to keep", hint="--keep-last 5, --keep-best reward_mean:max:2, ...")
    folder = open_folder(path)
    if dry_run:
        return _prune(folder, rules, damaged)
    with locked(folder):
        pruned = _prune(folder, rules, damaged)
        folder.discard([checkpoint.name for checkpoint in pruned.removed])
        folder.discard(pruned.damaged)
        return pruned


def _prune(folder: Folder, rules: Retention, damaged: bool) -> Pruned:
    found = folder.checkpoints()
    if not found:
        raise NotFoundError(f"there is no checkpoint in {folder.storage.describe()}")
    for metric, _, _ in rules.best_rules:  # a metric that none has would let all of them go
        require_metric(folder, found, metric)
    candidates = [candidate(checkpoint) for checkpoint in found]
    kept = select(candidates, rules, newest_valid(folder, candidates))
    removed = tuple(checkpoint for checkpoint in found if checkpoint.name not in kept)
    return Pruned(removed, kept, tuple(folder.damaged()) if damaged else ())


def parse_steps(text: str) -> list[int]:
    """``"25M,50M,1.5k"`` as numbers of steps. Raises ``SchemaError``."""
    steps = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        digits, suffix = part.rstrip("kKmMgGbB"), part[len(part.rstrip("kKmMgGbB")) :].lower()
        try:
            value = float(digits.replace("_", "")) * _FACTORS[suffix]
            if value != int(value) or value < 0:
                raise ValueError
        except (ValueError, KeyError, OverflowError) as error:
            raise SchemaError(f"{part!r} is no number of steps", hint="write it as 500000, 500k or 25M") from error
        steps.append(int(value))
    return steps


def parse_best(text: str) -> Best:
    """``"reward_mean"``, ``"loss:min"`` or ``"loss:min:3"`` as a ``keep_best`` rule. Raises ``SchemaError``."""
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    try:
        return metric, mode or "max", int(count or 1)
    except ValueError as error:
        raise SchemaError(f"{text!r} is no rule", hint="write it as reward_mean:max:2") from error
