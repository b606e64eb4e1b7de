"""A folder of checkpoints of any kind, for the commands: one interface for ours and for other programs'."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.foreign import ForeignFolder, foreign_kind
from trajstore.checkpoint.reading import verify_checkpoint
from trajstore.checkpoint.retention import Candidate, Retention, metric_names, metric_value, ranked
from trajstore.checkpoint.shelf import HISTORY, LOCK, Checkpoint, Shelf, candidate, has_name
from trajstore.errors import CorruptionError, NotFoundError
from trajstore.format.layout import PRIVATE
from trajstore.media.history import History
from trajstore.media.publish import ensure_folder, publish_file, recover
from trajstore.media.storage import LocalStorage, Storage

RULES = f"{PRIVATE}/rules.json"
_REMOVERS = 16  # threads: removing is waiting for the file system
_USUAL = (
    "reward_mean",
    "episode_reward_mean",
    "ep_rew_mean",
    "episode_return_mean",
    "success_rate",
    "reward",
    "return",
)


class Folder(Protocol):
    """What the commands need of a folder of checkpoints."""

    kind: str
    storage: LocalStorage

    def checkpoints(self) -> list[Checkpoint]: ...
    def files(self, name: str) -> list[Path]: ...
    def companions(self, name: str) -> list[str]: ...
    def verify(self, name: str) -> int: ...
    def discard(self, names: Sequence[str]) -> None: ...
    def history(self) -> list[dict[str, Any]]: ...
    def damaged(self) -> list[str]: ...


class OwnFolder:
    """A folder that ``Checkpoints`` fills."""

    kind = "trajstore"

    def __init__(self, path: Path) -> None:
        self.storage = LocalStorage(path)
        self.shelf = Shelf(self.storage)
        self.pool = Pool(2)

    def checkpoints(self) -> list[Checkpoint]:
        return self.shelf.checkpoints()

    def files(self, name: str) -> list[Path]:
        found = os.walk(self.storage.describe(name))
        return sorted(Path(folder, file) for folder, _, files in found for file in files)

    def companions(self, name: str) -> list[str]:
        return []

    def verify(self, name: str) -> int:
        return verify_checkpoint(self.storage.child(name), self.shelf.record(name), self.pool)

    def damaged(self) -> list[str]:
        """Names whose record cannot be read."""
        readable = self.shelf.records()
        return sorted(name for name in self.shelf.names() if name not in readable)

    def discard(self, names: Sequence[str]) -> None:
        pool = Pool(_REMOVERS if len(names) > _REMOVERS else 0)
        self.shelf.discard(*names, pool=pool)
        pool.close()

    def history(self) -> list[dict[str, Any]]:
        return [{"step": e["step"], **e["metrics"]} for e in History(self.storage, HISTORY).read()]


def open_folder(path: str | Path) -> Folder:
    """The folder's kind is told from its names.

    Raises ``NotFoundError`` if there is no folder, or nothing in it that looks like a checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}")
    if any(has_name(child.name) for child in folder.iterdir()) or (folder / HISTORY).exists():
        return OwnFolder(folder)
    kind = foreign_kind(folder)
    if kind is not None:
        return ForeignFolder(folder, kind)
    raise NotFoundError(
        f"there is no checkpoint in {folder}",
        hint="known are folders of trajstore, RLlib (checkpoint_000010), NavRL (checkpoint_10.pt[.lz4]), "
        "OpenRL and Stable-Baselines3 (name_1000_steps)",
    )


@contextmanager
def _locked(storage: Storage) -> Any:
    ensure_folder(storage, PRIVATE)
    lock = storage.lock(LOCK)
    try:
        recover(storage)
        yield
    finally:
        lock.release()


def locked(folder: Folder) -> AbstractContextManager[None]:
    """Hold the folder's lock: what removes something must not meet a run that saves. Raises ``LockedError``."""
    held: AbstractContextManager[None] = _locked(folder.storage)
    return held


def find(folder: Folder, which: str | int, metric: str | None = None, mode: str = "max") -> Checkpoint:
    """A checkpoint by step, by name, ``"latest"`` or ``"best"``. Raises ``NotFoundError`` saying what there is."""
    found = folder.checkpoints()
    if which == "latest" and found:
        return found[-1]
    if which == "best":
        if metric is not None:
            require_metric(folder, found, metric)
        best = best_of(folder, found, metric, mode)
        if best is not None:
            return best
        raise NotFoundError(
            f"no metric says which checkpoint in {folder.storage.describe()} is best",
            hint="name one: --metric reward_mean",
        )
    for checkpoint in reversed(found):
        if str(which) in (checkpoint.name, str(checkpoint.step)):
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found[-20:]) or "none"
    raise NotFoundError(
        f"there is no checkpoint {which} in {folder.storage.describe()}", hint=f"the steps there are: {steps}"
    )


def require_metric(folder: Folder, found: Sequence[Checkpoint], metric: str) -> None:
    """Raise ``NotFoundError`` naming the metrics there are, if none of the checkpoints found has this one."""
    if any(metric_value(checkpoint.metrics, metric) is not None for checkpoint in found):
        return
    known = dict.fromkeys(name for checkpoint in reversed(found) for name in metric_names(checkpoint.metrics))
    raise NotFoundError(
        f"no checkpoint in {folder.storage.describe()} has the metric {metric!r}",
        hint=f"there are {', '.join(list(known)[:40])}" if known else "they were saved without metrics",
    )


def best_of(
    folder: Folder, found: Sequence[Checkpoint], metric: str | None = None, mode: str = "max"
) -> Checkpoint | None:
    """The best checkpoint by a metric: the one named, that of the folder's rules, or one with a usual name."""
    if metric is None:
        rules = read_rules(folder.storage).best_rules
        if rules:
            metric, mode = rules[0][0], rules[0][1]
        else:
            metric = next(
                (name for name in _USUAL if any(metric_value(c.metrics, name) is not None for c in found)), None
            )
    if metric is None:
        return None
    order = ranked([candidate(checkpoint) for checkpoint in found], metric, mode)
    return next((c for c in found if order and c.name == order[0].name), None)


def newest_valid(folder: Folder, candidates: Sequence[Candidate]) -> str:
    """The name of the newest checkpoint that verifies. Raises ``CorruptionError`` if none does."""
    for newest in sorted(candidates, key=lambda c: c.order, reverse=True):
        try:
            folder.verify(newest.name)
            return newest.name
        except (CorruptionError, NotFoundError):
            continue
    raise CorruptionError(f"no checkpoint in {folder.storage.describe()} verifies", hint="nothing was removed")


def write_rules(storage: Storage, rules: Retention) -> None:
    """Keep a run's retention rules beside its checkpoints, for listings."""
    facts = {"keep_last": rules.keep_last, "keep_best": rules.best_rules, "keep_every": rules.keep_every}
    publish_file(storage, RULES, [json.dumps(facts).encode()])


def read_rules(storage: Storage) -> Retention:
    """The rules of the run that saves here; empty ones where they are not known."""
    if storage.size(RULES) is None:
        return Retention()
    try:
        facts = json.loads(storage.read(RULES))
        best = [(str(metric), str(mode), int(count)) for metric, mode, count in facts.get("keep_best") or ()]
        return Retention(keep_last=facts.get("keep_last"), keep_best=best, keep_every=facts.get("keep_every"))
    except (ValueError, TypeError, AttributeError):
        return Retention()
