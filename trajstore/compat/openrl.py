"""OpenRL's ``CheckpointCallback`` with its names and files: ``{prefix}_{steps}_steps/module.pt``.

``from trajstore.compat.openrl import CheckpointCallback`` instead of OpenRL's own; nothing else changes.

``save_freq`` counts calls of the callback, as theirs does: one call is one step of *every* environment, so with 500
environments ``save_freq=20_000`` means 10 million environment steps. Names carry environment steps, without zero
padding, as theirs do: sort them with ``trajstore ckpt ls``, not with ``ls``.

What differs: a folder appears whole or not at all; ``save_replay_buffer=True`` works; after :func:`load_checkpoint`
the counters go on where they were; a path that is not there raises; old checkpoints can be cleaned up by rule.
"""

from __future__ import annotations

import os
import pickle
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trajstore.checkpoint.retention import Candidate, Retention, select
from trajstore.checkpoint.shelf import Shelf
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.layout import PRIVATE, temporary
from trajstore.media.publish import adopt, discard, ensure_folder, publish_file, publish_folder, recover
from trajstore.media.storage import LocalStorage, Lock
from trajstore.operations.receipt import check_receipt, forget_receipt, read_receipt, write_receipt

try:
    from openrl.utils.callbacks.callbacks import BaseCallback as _Base
except ImportError:

    class _Base:  # type: ignore[no-redef]
        """What OpenRL's trainers call, for when OpenRL is not installed."""

        def __init__(self, verbose: int = 0) -> None:
            self.verbose = verbose
            self.n_calls = 0
            self.num_time_steps = 0
            self.agent: Any = None
            self.training_env: Any = None
            self.locals: dict[str, Any] = {}
            self.globals: dict[str, Any] = {}
            self.parent: Any = None

        def init_callback(self, agent: Any) -> None:
            self.agent = agent
            self.training_env = agent.get_env() if hasattr(agent, "get_env") else None
            self._init_callback()

        def on_training_start(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
            self.locals, self.globals = locals_, globals_
            self.num_time_steps = self.agent.num_time_steps
            self._on_training_start()

        def on_step(self) -> bool:
            self.n_calls += 1
            self.num_time_steps = self.agent.num_time_steps
            return self._on_step()

        def update_locals(self, locals_: dict[str, Any]) -> None:
            self.locals.update(locals_)

        def set_parent(self, parent: Any) -> None:
            self.parent = parent

        def on_rollout_start(self) -> None: ...
        def on_rollout_end(self) -> None: ...
        def on_training_end(self) -> None: ...
        def _init_callback(self) -> None: ...
        def _on_training_start(self) -> None: ...
        def _on_step(self) -> bool:
            return True


_NAME = re.compile(r"(?P<prefix>.*)_(?P<steps>\d+)_steps")


class CheckpointCallback(_Base):  # type: ignore[misc]
    """Saves the agent's module every ``save_freq`` calls.

    Parameters
    ----------
    save_freq : calls between two saves (see the module's first lines).
    save_path : the folder of the checkpoints.
    name_prefix : begins their names.
    save_replay_buffer : save the replay buffer beside each, as ``{prefix}_replay_buffer_{steps}_steps.pkl``.
    verbose : 2 prints a line for each save.
    keep_last, keep_every : keep the newest so many, and the first at or after each multiple of so many environment
        steps; the rest is removed after a save. Neither (the default) keeps all.
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str | os.PathLike[str],
        name_prefix: str = "rl_model",
        save_replay_buffer: bool = False,
        verbose: int = 0,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        super().__init__(verbose)
        if save_freq < 1:
            raise SchemaError(f"save_freq is {save_freq}: it counts calls, from 1")
        self.save_freq = save_freq
        self.save_path = os.fspath(save_path)
        self.name_prefix = name_prefix
        self.save_replay_buffer = save_replay_buffer
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every)
        self._storage = LocalStorage(self.save_path)
        self._lock: Lock | None = None
        self._behind = 0  # steps of the run that this process's agent has not counted

    def _init_callback(self) -> None:
        self._claim()
        if self.save_replay_buffer:  # rather now than after hours
            _buffer(self.agent)

    def _on_training_start(self) -> None:
        resumed = getattr(self.agent, _RESUMED, None)
        if resumed is not None:
            self.n_calls = resumed["n_calls"]
            # Some trainers start the agent's count anew, some do not.
            self._behind = max(resumed["num_time_steps"] - self.agent.num_time_steps, 0)

    def _on_step(self) -> bool:
        self.num_time_steps = self.agent.num_time_steps + self._behind
        if self.n_calls % self.save_freq == 0:
            self.save()
        return True

    def save(self) -> str:
        """Save now; returns the checkpoint's path."""
        self._claim()
        storage = self._storage
        name = f"{self.name_prefix}_{self.num_time_steps}_steps"
        token = uuid.uuid4().hex[:12]
        theirs, ours = (temporary(PRIVATE, f"{token}.{kind}") for kind in ("theirs", "ours"))
        try:
            self.agent.save(storage.describe(theirs))
            adopt(storage, theirs, ours)
            publish_folder(storage, ours, name)
        finally:
            storage.remove(theirs)
            storage.remove(ours)
        write_receipt(storage, name, n_calls=self.n_calls, num_time_steps=self.num_time_steps, time=time.time())
        if self.save_replay_buffer:
            # A name and format of theirs: a pickle.
            buffer = pickle.dumps(_buffer(self.agent), protocol=4)
            publish_file(storage, f"{self.name_prefix}_replay_buffer_{self.num_time_steps}_steps.pkl", [buffer])
        if self.verbose >= 2:
            print(f"Saving model checkpoint to {storage.describe(name)}")
        self._clean_up(name)
        return storage.describe(name)

    def _claim(self) -> None:
        if self._lock is None:
            ensure_folder(self._storage, "")
            ensure_folder(self._storage, PRIVATE)
            self._lock = self._storage.lock(f"{PRIVATE}/lock")
            recover(self._storage)

    def _clean_up(self, newest: str) -> None:
        candidates = []
        marks = Shelf(self._storage).marks()
        for name, steps in _checkpoints(self.save_path, self.name_prefix):
            saved = Path(self.save_path, name, "module.pt").stat().st_mtime_ns  # not the steps: a resume goes back
            pinned = bool(marks.get(name, {}).get("pinned"))
            candidates.append(Candidate(name=name, step=steps, order=(name == newest, saved), pinned=pinned))
        kept = select(candidates, self._retention)
        for candidate in candidates:
            if candidate.name not in kept:
                discard(self._storage, candidate.name)
                discard(self._storage, f"{self.name_prefix}_replay_buffer_{candidate.step}_steps.pkl")
                forget_receipt(self._storage, candidate.name)


_RESUMED = "_trajstore_resumed"


def load_checkpoint(agent: Any, path: str | os.PathLike[str]) -> int:
    """Load a checkpoint into an agent, so that training goes on with the counters that it was saved with.

    Parameters
    ----------
    agent : its ``load`` gets the path.
    path : a checkpoint's folder, or a folder of checkpoints, whose latest is taken.

    Returns
    -------
    int : the environment steps of the checkpoint.

    Raises
    ------
    NotFoundError : there is no such checkpoint.
    CorruptionError : its files do not match their checksums.
    """
    folder = Path(os.fspath(path))
    if not (folder / "module.pt").is_file():
        found: Sequence[tuple[str, int]] = _checkpoints(folder, None) if folder.is_dir() else ()
        if not found:
            raise NotFoundError(f"there is no checkpoint {folder}", hint="training would have started from scratch")
        # The one saved last; of those that an older program wrote, the one that got furthest.
        saved = {name: (read_receipt(LocalStorage(folder), name) or {}).get("time", 0.0) for name, _ in found}
        folder = folder / max(found, key=lambda item: (saved[item[0]], item[1]))[0]
    storage = LocalStorage(folder.parent)
    check_receipt(storage, folder.name)
    match = _NAME.fullmatch(folder.name)
    receipt = read_receipt(storage, folder.name) or {}
    steps = int(receipt.get("num_time_steps") or (match["steps"] if match else 0))
    agent.load(str(folder))
    agent.num_time_steps = steps
    calls = receipt.get("n_calls")
    if calls is None:
        calls = steps // max(
            int(getattr(agent, "env_num", 1) or 1), 1
        )  # an old checkpoint: a call stepped every environment
    setattr(agent, _RESUMED, {"n_calls": int(calls), "num_time_steps": steps})
    return steps


def _checkpoints(folder: str | os.PathLike[str], prefix: str | None) -> list[tuple[str, int]]:
    """``(name, environment steps)`` of the whole checkpoints in a folder."""
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (prefix is None or match["prefix"] == prefix) and (path / "module.pt").is_file():
            found.append((path.name, int(match["steps"])))
    return sorted(found, key=lambda item: item[1])


def _buffer(agent: Any) -> Any:
    for owner in (agent, getattr(agent, "driver", None)):
        for name in ("replay_buffer", "buffer"):
            buffer = getattr(owner, name, None)
            if buffer is not None:
                return buffer
    raise SchemaError(
        "save_replay_buffer=True, but the agent has no replay buffer", hint="set agent.replay_buffer, or leave it off"
    )
