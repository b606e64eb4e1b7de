"""Folders that other programs fill: RLlib scripts, NavRL's saver, OpenRL's and Stable-Baselines3's callbacks.

They are listed, verified, pinned, pruned and archived in place; nothing in them is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from trajstore.checkpoint.shelf import Checkpoint, Shelf
from trajstore.errors import CorruptionError, MissingDependencyError
from trajstore.format.layout import PRIVATE
from trajstore.media.publish import discard, publish_file
from trajstore.media.storage import LocalStorage
from trajstore.operations.receipt import check_receipt, forget_receipt, read_receipt

INDEX = "checkpoint_index.json"
METADATA = "metadata.json"
_RLLIB = re.compile(r"checkpoint_(\d+)")
_STEPS = re.compile(r"(?P<prefix>.*)_(?P<steps>\d+)_steps(?:\.zip)?")
_BUFFER = re.compile(r".*_replay_buffer_\d+_steps(?:\.pkl|\.zip)?")
_TORCH = re.compile(r"(?P<stem>.+?)\.(?:pt|pth)(?:\.lz4)?")
_NUMBER = re.compile(r"(?:.*[_-])?(?P<step>\d+)")
_METRIC = re.compile(r"checkpoint_iter_(?P<step>\d+)(?:_(?P<metric>.+)_(?P<value>-?\d+(?:\.\d+)?|nan|-?inf))?")
_HISTORY = re.compile(r"metrics_(?:interrupted_)?iter_(\d+)\.json")
_FACTS = frozenset({"iteration", "timestamp", "checkpoint_path", "final", "interrupted", "versions"})


class ForeignFolder:
    """Checkpoints in another program's layout.

    Parameters
    ----------
    kind : ``rllib``, ``navrl`` or ``steps`` (OpenRL, Stable-Baselines3).
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        self.storage = LocalStorage(path)
        self._path = path
        self._shelf = Shelf(self.storage)  # of the marks

    def checkpoints(self) -> list[Checkpoint]:
        """What is there, in the order of saving."""
        find: Callable[[], list[dict[str, Any]]] = getattr(self, f"_find_{self.kind}")
        marks = self._shelf.marks()
        found = []
        for facts in find():
            mark = marks.get(facts["name"], {})
            files = self.files(facts["name"])
            size = sum(file.stat().st_size for file in files)
            facts["interrupted"] = bool(facts.get("interrupted") or mark.get("interrupted"))
            found.append(
                Checkpoint(
                    path=str(self._path / facts["name"]), serial=0, raw_bytes=size, stored_bytes=size,
                    pinned=bool(mark.get("pinned")), note=str(mark.get("note", "")), **facts,
                )
            )  # fmt: skip
        found.sort(key=lambda checkpoint: (checkpoint.time, checkpoint.step))
        return [Checkpoint(**{**vars(checkpoint), "serial": serial}) for serial, checkpoint in enumerate(found, 1)]

    def files(self, name: str) -> list[Path]:
        """All files that belong to a checkpoint."""
        path = self._path / name
        return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]

    def companions(self, name: str) -> list[str]:
        """Other names that go with a checkpoint: the replay buffer saved beside it."""
        match = _STEPS.fullmatch(name)
        if self.kind != "steps" or match is None:
            return []
        stem = f"{match['prefix']}_replay_buffer_{match['steps']}_steps"
        return [other for other in (f"{stem}.pkl", f"{stem}.zip") if (self._path / other).exists()]

    def verify(self, name: str) -> int:
        """Check a checkpoint's files against their receipt, and against the checksums their formats carry.

        Returns how many files had something to check. Raises ``CorruptionError``.
        """
        checked = check_receipt(self.storage, name)
        for file in self.files(name):
            checked += _check_file(file)
        if (
            self.kind == "rllib"
            and (self._path / name / METADATA).exists()
            and read_json(self._path / name / METADATA) is None
        ):
            raise CorruptionError(f"{self._path / name / METADATA} is not readable")
        return checked

    def discard(self, names: Sequence[str]) -> None:
        """Remove checkpoints; first from the index, so that it never names what is not there."""
        gone = set(names)
        index = read_json(self._path / INDEX) if self.kind == "rllib" else None
        if index is not None and isinstance(index.get("checkpoints"), list):
            kept = [e for e in index["checkpoints"] if not (isinstance(e, dict) and e.get("path") in gone)]
            index = {**index, "checkpoints": kept, "last_updated": datetime.now().isoformat()}
            publish_file(self.storage, INDEX, [json.dumps(index, indent=2).encode()])
        discard(self.storage, *(one for name in names for one in (*self.companions(name), name)))
        for name in names:
            forget_receipt(self.storage, name)
            self.storage.remove(f"{PRIVATE}/marks/{name}.json")

    def damaged(self) -> list[str]:
        """Names that say nothing of themselves; here none, a damaged one is listed and fails to verify."""
        return []

    def history(self) -> list[dict[str, Any]]:
        """The metrics history that the program exported, else the checkpoints' own metrics."""
        exported = load_metrics_history(self._path) if self.kind == "rllib" else []
        return exported or [{"step": c.step, **c.metrics} for c in self.checkpoints() if c.metrics]

    def _find_rllib(self) -> list[dict[str, Any]]:
        found = []
        for path in self._path.iterdir():
            match = _RLLIB.fullmatch(path.name)
            if match and path.is_dir():
                metadata = read_json(path / METADATA) or {}
                metrics = {key: value for key, value in metadata.items() if key not in _FACTS}
                found.append(
                    {
                        "name": path.name, "step": int(match[1]), "time": _time(metadata.get("timestamp"), path),
                        "metrics": metrics, "final": bool(metadata.get("final")),
                        "interrupted": bool(metadata.get("interrupted")),
                        "versions": metadata.get("versions") or {},
                    }
                )  # fmt: skip
        return found

    def _find_navrl(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in self._path.iterdir():
            match = _TORCH.fullmatch(path.name)
            if not match or not path.is_file():
                continue
            metric, number = _METRIC.fullmatch(match["stem"]), _NUMBER.fullmatch(match["stem"])
            metrics = {metric["metric"]: float(metric["value"])} if metric and metric["metric"] else {}
            step = int(metric["step"]) if metric else int(number["step"]) if number else None
            final = "final" in match["stem"]
            if step is None and not final:
                continue
            found.append(
                {"name": path.name, "step": step, "time": path.stat().st_mtime, "metrics": metrics, "final": final}
            )
        steps = [facts["step"] for facts in found if facts["step"] is not None]
        for facts in found:
            if facts["step"] is None:
                facts["step"] = max(steps, default=0)  # its name does not say; it came last
        return found

    def _find_steps(self) -> list[dict[str, Any]]:
        found = []
        for path in self._path.iterdir():
            match = _STEPS.fullmatch(path.name)
            module = path / "module.pt" if path.suffix != ".zip" else path
            if match and not _BUFFER.fullmatch(path.name) and module.is_file():
                receipt = read_receipt(self.storage, path.name) or {}
                saved = float(receipt.get("time") or module.stat().st_mtime)
                found.append({"name": path.name, "step": int(match["steps"]), "time": saved})
        return found


def foreign_kind(path: Path) -> str | None:
    """Whose layout a folder has, or ``None``."""
    for entry in path.iterdir():
        if entry.is_dir() and _RLLIB.fullmatch(entry.name):
            return "rllib"
        if _STEPS.fullmatch(entry.name) and ((entry / "module.pt").is_file() or entry.suffix == ".zip"):
            return "steps"
        if entry.is_file() and _TORCH.fullmatch(entry.name):
            return "navrl"
    return None


def load_metrics_history(folder: str | Path, iteration: int | None = None) -> list[dict[str, Any]]:
    """The metrics history up to an iteration (``None``: all), from the exported file that reaches furthest.

    Empty if there is none. A file that cannot be read is passed over with a warning.
    """
    folder = Path(folder)
    files = [(math.inf, folder / "final_metrics.json")]
    for path in folder.glob("metrics_*.json"):
        match = _HISTORY.fullmatch(path.name)
        if match:
            files.append((int(match[1]), path))
    best: list[dict[str, Any]] = []
    for _, path in sorted(files):
        if not path.exists():
            continue
        history = read_json(path, kind=list)
        if history is None:
            warnings.warn(f"{path} is not readable and was passed over", stacklevel=2)
            continue
        entries = [{"iteration": position, **e} for position, e in enumerate(history, 1) if isinstance(e, dict)]
        upto = [entry for entry in entries if iteration is None or entry["iteration"] <= iteration]
        if _reach(upto) >= _reach(best):
            best = upto
    return best


def _reach(history: Sequence[Mapping[str, Any]]) -> float:
    return max((float(entry["iteration"]) for entry in history), default=-1.0)


def _check_file(file: Path) -> int:
    """What a file's own format says of its bytes: 1 if it carries checksums and they hold, 0 if it carries none."""
    data = file.read_bytes()
    if file.name.endswith(".lz4"):
        try:
            import lz4.frame
        except ImportError as error:
            raise MissingDependencyError(f"{file} needs the package lz4", hint="pip install lz4") from error
        try:
            data = lz4.frame.decompress(data)
        except RuntimeError as error:
            raise CorruptionError(f"{file} is no whole LZ4 frame: {error}") from error
    if not file.name.removesuffix(".lz4").endswith((".pt", ".pth", ".zip")):
        return 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        if data[:1] == b"\x80":
            return 0  # torch's older format: a pickle, without checksums
        raise CorruptionError(f"{file} is no whole torch file: {error}") from error
    if damaged is not None:
        raise CorruptionError(f"{file} is damaged: {damaged} does not match its checksum")
    return 1


def _time(stamp: Any, path: Path) -> float:
    try:
        return datetime.fromisoformat(str(stamp)).timestamp()
    except ValueError:
        return path.stat().st_mtime


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; ``None`` if it cannot be read or is of another kind."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, kind) else None
