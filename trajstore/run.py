"""A training run's folder: a name of its own that sorts, and a record that survives whatever ends the run."""

from __future__ import annotations

import atexit
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trajstore.errors import AlreadyExistsError, CorruptionError, NotFoundError, StateError, TrajstoreError
from trajstore.format import typedjson
from trajstore.format.checksum import crc32c
from trajstore.format.layout import PRIVATE
from trajstore.media.history import History
from trajstore.media.publish import ensure_folder, publish_file
from trajstore.media.storage import LocalStorage, Lock
from trajstore.versions import library_versions

RECORD = "run.json"
METRICS = "metrics.jsonl"
CONFIG = "config"
DIFF = "source.diff"
_LOCK = f"{PRIVATE}/run.lock"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_DIFF = 8 << 20
_SYNC_EVERY = 10.0


def run_dir(
    root: str | Path,
    name: str = "run",
    *,
    config: Mapping[str, Any] | None = None,
    files: Iterable[str | Path] = (),
    notes: str = "",
) -> Run:
    """Make a folder for a run: ``{UTC time}-{name}``, with a number if that is taken.

    Parameters
    ----------
    root : where the runs are; made if it is not there.
    name : what the run is; characters that file names should not have become ``-``.
    config : of the run, JSON-like; recorded.
    files : configuration files and folders, copied into ``config/``.
    notes : for people.

    Returns
    -------
    Run : ``run.path`` is the folder, and ``run`` itself serves as a path.
    """
    storage = LocalStorage(root)
    ensure_folder(storage, "")
    stem = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{_UNSAFE.sub('-', name).strip('-') or 'run'}"
    number, folder = 1, stem
    while True:
        try:
            storage.make_folder(folder)  # of two that start in one second, one gets it
            break
        except AlreadyExistsError:
            number += 1
            folder = f"{stem}-{number}"
    storage.sync_folder("")
    return Run(storage.child(folder), _facts(name, config, notes), files)


def resume_run(path: str | Path, step: int | None = None) -> Run:
    """Go on with a run in its folder, from ``step``: metrics logged beyond it are abandoned, not lost.

    Raises
    ------
    NotFoundError : there is no run. LockedError : it is running.
    """
    storage = LocalStorage(path)
    record = _read(storage)
    run = Run(storage, record, (), resumed=True)
    if step is not None:
        run.history.resume(step)
    return run


class Run:
    """A run in progress. Ends with :meth:`finish`, with its ``with`` block, or with the process.

    While it lives it holds a lock, so that a listing knows a run that was killed from one that goes on.
    """

    def __init__(
        self, storage: LocalStorage, record: dict[str, Any], files: Iterable[str | Path], *, resumed: bool = False
    ) -> None:
        self._storage = storage
        self._ended = False
        self._synced = time.monotonic()
        ensure_folder(storage, PRIVATE)
        self._lock: Lock = storage.lock(_LOCK)
        self.record = record
        self.history = History(storage, METRICS)
        if resumed:
            sessions = record.setdefault("sessions", [])
            sessions.append({key: record.get(key) for key in ("started", "ended", "status", "command", "pid", "host")})
            record.update(_session(), status="running", ended=None, result=None, error=None)
        else:
            self._save_files(files)
        self._write()
        _running.add(self)

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._storage.describe())

    def __fspath__(self) -> str:
        return self._storage.describe()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, step: int, metrics: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Add metrics of a step to ``metrics.jsonl``; they survive a kill at once, a power cut within 10 s."""
        self._check()
        sync = time.monotonic() - self._synced > _SYNC_EVERY
        self.history.append(step, {**(metrics or {}), **more}, sync=sync)
        if sync:
            self._synced = time.monotonic()

    def note(self, text: str) -> None:
        """Add a note for people, with the time."""
        self._check()
        self.record["notes"].append({"time": _now(), "text": text})
        self._write()

    def finish(self, result: Any = None, *, status: str = "done", error: str | None = None) -> None:
        """Write how the run ended: a result (JSON-like: a success rate, a score), and let go of it."""
        if self._ended:
            return
        self._ended = True
        _running.discard(self)
        seconds = time.time() - self.record["started_seconds"]
        self.record.update(
            status=status, ended=_now(), duration=round(self.record.get("duration", 0.0) + seconds, 3),
            result=_plain(result), error=error,
        )  # fmt: skip
        try:
            self._write()
        finally:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish(self.record.get("result"))
        else:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.finish(status=status, error=f"{type(error).__name__}: {error}")

    def _check(self) -> None:
        if self._ended:
            raise StateError(f"the run {self.path.name} has ended", hint="resume_run(path) goes on with it")

    def _write(self) -> None:
        publish_file(self._storage, RECORD, [json.dumps(self.record, indent=2, ensure_ascii=False).encode()])

    def _save_files(self, files: Iterable[str | Path]) -> None:
        for source in map(Path, files):
            if not source.exists():
                raise NotFoundError(f"there is no configuration file {source}")
            found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
            for path in found:
                below = path.relative_to(source.parent).as_posix()
                data = path.read_bytes()
                ensure_folder(self._storage, f"{CONFIG}/{below}".rpartition("/")[0])
                publish_file(self._storage, f"{CONFIG}/{below}", [data])
                self.record["files"][below] = f"{crc32c(data):08x}"
        diff = self.record.pop("diff", b"")
        if diff:
            publish_file(self._storage, DIFF, [diff])


@dataclass(frozen=True)
class RunInfo:
    """One run, as a listing shows it.

    status : ``running``, ``done``, ``failed``, ``interrupted``, or ``crashed``: it says that it runs, and nobody holds
    its lock. duration : seconds, ``None`` while it runs. step, metrics : the latest that were logged.
    """

    name: str
    path: str
    status: str
    started: str
    duration: float | None
    result: Any
    revision: str
    host: str
    notes: tuple[str, ...] = ()
    step: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def list_runs(root: str | Path) -> list[RunInfo]:
    """The runs in a folder, by name, which is by time. Raises ``NotFoundError`` if there is no such folder."""
    storage = LocalStorage(root)
    if not Path(root).is_dir():
        raise NotFoundError(f"there is no folder {storage.describe()}", hint="the one that run_dir() made runs in")
    found = []
    for name in sorted(storage.list("")):
        child = storage.child(name)
        if child.size(RECORD) is not None:
            try:
                found.append(read_run(child.describe()))
            except CorruptionError as error:
                found.append(RunInfo(name, child.describe(), "unreadable", "", None, str(error), "", ""))
    return found


def read_run(path: str | Path) -> RunInfo:
    """One run. Raises ``NotFoundError``, and ``CorruptionError`` for a record that cannot be read."""
    storage = LocalStorage(path)
    record = _read(storage)
    status = str(record.get("status"))
    if status == "running" and storage.holder(_LOCK) is None:
        status = "crashed"
    entries = History(storage, METRICS).read()
    git = record.get("git") or {}
    return RunInfo(
        name=Path(storage.describe()).name,
        path=storage.describe(),
        status=status,
        started=str(record.get("started")),
        duration=record.get("duration") if status not in ("running", "crashed") else None,
        result=record.get("result"),
        revision=str(git.get("revision", ""))[:10] + ("+" if git.get("dirty") else ""),
        host=str(record.get("host")),
        notes=tuple(str(note.get("text")) for note in record.get("notes", [])),
        step=entries[-1]["step"] if entries else None,
        metrics=entries[-1]["metrics"] if entries else {},
        record=record,
    )


def diff_runs(left: str | Path, right: str | Path) -> dict[str, tuple[Any, Any]]:
    """What differs between two runs: ``{name: (left, right)}`` of configuration, files, source, versions, result.

    ``None`` stands for what one of them has not.
    """
    sides = []
    for path in (left, right):
        info = read_run(path)
        chosen = {
            key: info.record.get(key)
            for key in ("config", "files", "git", "versions", "command", "python", "gpu", "result")
        }
        chosen["status"], chosen["metrics"] = info.status, dict(info.metrics)
        sides.append(_flatten(chosen))
    names = dict.fromkeys([*sides[0], *sides[1]])
    return {
        name: (sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _read(storage: LocalStorage) -> dict[str, Any]:
    if storage.size(RECORD) is None:
        raise NotFoundError(f"there is no run in {storage.describe()}", hint="run_dir(root, name) makes one")
    try:
        record = json.loads(storage.read(RECORD))
    except ValueError as error:
        raise CorruptionError(f"{storage.describe(RECORD)} is not readable: {error}") from error
    if not isinstance(record, dict):
        raise CorruptionError(f"{storage.describe(RECORD)} is no run's record")
    return record


def _facts(name: str, config: Mapping[str, Any] | None, notes: str) -> dict[str, Any]:
    git, diff = _git()
    return {
        "format": 1,
        "name": name,
        "status": "running",
        **_session(),
        "ended": None,
        "result": None,
        "error": None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": _gpus(),
        "git": git,
        "versions": library_versions(),
        "config": _plain(dict(config or {})),
        "files": {},
        "notes": [{"time": _now(), "text": notes}] if notes else [],
        "diff": diff,
    }


def _session() -> dict[str, Any]:
    return {
        "started": _now(),
        "started_seconds": time.time(),
        "command": [sys.executable, *sys.argv],
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _git() -> tuple[dict[str, Any] | None, bytes]:
    revision = _run_quietly("git", "rev-parse", "HEAD")
    if revision is None:
        return None, b""
    status = _run_quietly("git", "status", "--porcelain", "--untracked-files=no") or b""
    diff = (_run_quietly("git", "diff", "HEAD") or b"") if status.strip() else b""
    branch = _run_quietly("git", "rev-parse", "--abbrev-ref", "HEAD") or b""
    facts = {
        "revision": revision.decode().strip(),
        "branch": branch.decode().strip(),
        "dirty": bool(status.strip()),
    }
    return facts, diff if len(diff) <= _MAX_DIFF else b""


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.cuda.get_device_name(index) for index in range(count)]
    return (_run_quietly("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or b"").decode().split("\n")[:-1]


def _run_quietly(*command: str) -> bytes | None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _plain(value: Any) -> Any:
    return json.loads(typedjson.dumps(value))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


_running: weakref.WeakSet[Run] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    for run in list(_running):
        error = getattr(sys, "last_value", None)
        try:
            if error is None:
                run.finish(run.record.get("result"))
            else:
                run.finish(status="failed", error=f"{type(error).__name__}: {error}")
        except TrajstoreError as problem:
            print(f"the record of {run.path} could not be written: {problem}", file=sys.stderr)  # noqa: T201
