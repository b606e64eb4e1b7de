"""The names of the route collectors' ``routes_ckpt_storage``, backed by a store.

``from trajstore.compat.routes_ckpt_storage import CheckpointManifest, RoutesShardWriter, build_routes_npz_from_ckpt``
in the place of the old module; nothing else in a collector changes. The store is ``<ckpt_dir>/routes.zarr``;
``manifest.json`` beside it is written for people and scripts, and never read while there is a store.

What differs: routes and progress become durable together, so a kill neither loses seeds nor collects any twice; a
batch's progress counts when the next batch reports its own, until then the batch is repeated and the routes stored of
it are dropped; a folder of the old kind is imported once, its shards left as they are; starting over on top of a
collection is refused; errors of the disk are raised.

::

    python -m trajstore.compat.routes_ckpt_storage info  --ckpt_dir D
    python -m trajstore.compat.routes_ckpt_storage build --ckpt_dir D --out_npz F [--mode pkd] [--max_routes N]
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.errors import AlreadyExistsError, NotFoundError, TrajstoreError
from trajstore.exporters.routes import export_routes
from trajstore.format.layout import ROOT
from trajstore.format.progress import Progress
from trajstore.importers.routes import RoutesReport, import_routes
from trajstore.media.config import describe_config
from trajstore.media.publish import publish_file
from trajstore.media.storage import LocalStorage
from trajstore.npz import NpzReader
from trajstore.routes import (
    EPISODES,
    KEYS,
    META_KEYS,
    MODES,
    SETTINGS,
    RouteRecorder,
    RoutesView,
    find_routes,
    routes_state,
)
from trajstore.writer import create

__all__ = ["CheckpointManifest", "RoutesShardWriter", "build_routes_npz_from_ckpt"]

STORE = "routes.zarr"
_MANIFEST = "manifest.json"

Array = np.ndarray[Any, Any]


@dataclass
class CheckpointManifest:
    """How far a collection has come, and with which settings; the keys of ``manifest.json``.

    ``num_tasks_collected`` counts the routes that are stored, at any time; ``shards_written`` counts commits. A setting
    that is ``None`` is not known (older manifests lack some).
    """

    storage_format: str = "ckpt_shards_v1"
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)
    num_tasks_target: int = 0
    num_tasks_collected: int = 0
    current_seed: int = 0
    seeds_attempted: int = 0
    shards_written: int = 0
    env_name: str | None = None
    model_ckpt: str | None = None
    distribution_mode: str | None = None
    max_steps: int | None = None
    max_ep_len: int | None = None
    require_success: int | None = None
    adapt_episodes: int | None = None
    record_episodes: int | None = None
    out_npz: str | None = None
    model_hashes: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """sha256 by path of the model that the stored routes were collected with, if it was there; not in the file."""

    @classmethod
    def load(cls, ckpt_dir: str | os.PathLike[str]) -> CheckpointManifest | None:
        """What the folder holds, counted; ``None`` if it holds no collection.

        Of a folder of the old kind the routes are counted, not what its manifest says of them.
        Raises ``FormatError`` for a store that cannot be read.
        """
        storage = LocalStorage(ckpt_dir)
        if storage.size(f"{STORE}/{ROOT}") is not None:
            return _of_store(open_dataset(storage.child(STORE)))
        if not storage.list("shards") and storage.size(_MANIFEST) is None:
            return None
        return _of_folder(ckpt_dir)

    def save(self, ckpt_dir: str | os.PathLike[str]) -> None:
        """Write ``manifest.json``, atomically. It informs; the store decides."""
        storage = LocalStorage(ckpt_dir)
        storage.make_root()
        self.updated_at = time.time()
        publish_file(storage, _MANIFEST, [json.dumps(self._public(), indent=2, default=str).encode() + b"\n"])

    def validate_resume(self, args: Any) -> tuple[bool, str]:
        """Whether a run with these arguments continues this collection, and if not, what differs.

        Compares each setting that ``args`` has; ``num_tasks_target`` may change.
        """
        differences = []
        for name in SETTINGS:
            stored, given = getattr(self, name), getattr(args, name, None)
            if None not in (stored, given) and stored != given and not _same_file(stored, given):
                differences.append(f"{name}: stored {stored!r}, given {given!r}")
        model = getattr(args, "model_ckpt", None)
        now = set(_hashes(model).values())
        if now and self.model_hashes and now != set(self.model_hashes.values()):
            differences.append(f"model_ckpt: the content of {model} is another")
        if differences:
            return False, "the collection was made with other settings: " + "; ".join(differences)
        return True, "ok"

    def _public(self) -> dict[str, Any]:
        values = asdict(self)
        del values["model_hashes"]
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}

    def _meta(self, kept: dict[str, Any]) -> dict[str, Any]:
        """What their builder puts into ``meta``; ``kept`` has what this manifest has no place for."""
        public = self._public()
        meta = {key: public.get(key, kept.get(key, 0)) for key in META_KEYS}
        meta["require_success"] = bool(self.require_success)
        return {**kept, **meta} if kept else meta


def _hashes(model: str | os.PathLike[str] | None) -> dict[str, str]:
    """sha256 by path of a model checkpoint; empty if there is none."""
    if not model or not os.path.isfile(model):
        return {}
    return dict(describe_config(None, [model])["files"])


def _same_file(stored: object, given: object) -> bool:
    if not isinstance(stored, str) or not isinstance(given, str):
        return False
    return os.path.exists(given) and os.path.realpath(stored) == os.path.realpath(given)


def _of_store(dataset: Dataset) -> CheckpointManifest:
    manifest = dataset.snapshots[0].manifest
    target, state = Progress.state_from_json(manifest.progress)
    routes = routes_state(state)
    known = {**routes.get("manifest", {}), **manifest.config.get("values", {})}
    found = _from_dict(known)
    found.num_tasks_collected = len(dataset)
    found.num_tasks_target = target or 0
    found.current_seed = int(routes.get("current_seed") or 0)
    found.seeds_attempted = int(routes.get("seeds_attempted") or 0)
    found.shards_written = manifest.commit.number
    found.updated_at = manifest.commit.time
    found.model_hashes = dict(manifest.config.get("files", {}))
    return found


def _of_folder(ckpt_dir: str | os.PathLike[str]) -> CheckpointManifest:
    """An old folder, its routes counted; where routes were lost it goes on behind the last one found."""
    source = find_routes(ckpt_dir)
    found = _from_dict(source.manifest)
    seeds = _seeds(source.files)
    if seeds and (not source.manifest or found.num_tasks_collected > len(seeds)):
        behind = max(seeds) + 1
        if not source.manifest:
            found.current_seed, found.seeds_attempted = behind, behind - min(seeds)
        elif behind < found.current_seed:
            found.seeds_attempted = max(found.seeds_attempted - (found.current_seed - behind), 0)
            found.current_seed = behind
    found.num_tasks_collected = len(set(seeds))
    return found


def _seeds(files: Iterable[str]) -> list[int]:
    seeds: list[int] = []
    for file in files:
        try:
            with NpzReader(file) as reader:
                seeds += reader.read("routes_seed").tolist()
        except TrajstoreError:
            continue  # the import names it
    return seeds


def _from_dict(values: dict[str, Any]) -> CheckpointManifest:
    names = {spec.name for spec in fields(CheckpointManifest) if spec.init}
    return CheckpointManifest(**{key: value for key, value in values.items() if key in names and value is not None})


class RoutesShardWriter:
    """Appends routes to the store of a folder.

    Parameters
    ----------
    ckpt_dir : folder; made if it is not there. One of the old kind is imported first.
    shard_size : routes after which a commit follows; flush_secs : seconds after which one does.
    manifest : a loaded one to go on, a new one to begin; by default what the folder holds.

    Attributes
    ----------
    manifest : live. buffer : seeds of the routes not committed yet. shards_dir : where old shards lie.

    Raises
    ------
    AlreadyExistsError : a new manifest, and the folder holds routes.
    LockedError : another collector writes to the folder.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike[str],
        shard_size: int = 25,
        flush_secs: float = 60.0,
        manifest: CheckpointManifest | None = None,
    ) -> None:
        self.ckpt_dir = os.fspath(ckpt_dir)
        self.shard_size, self.flush_secs = shard_size, flush_secs
        self.shards_dir = os.path.join(self.ckpt_dir, "shards")
        os.makedirs(self.shards_dir, exist_ok=True)
        stored = CheckpointManifest.load(self.ckpt_dir)
        self._refuse_fresh(stored, manifest)
        self.import_report = self._import_shards()
        self.manifest = manifest or stored or CheckpointManifest()
        self._writer = create(
            os.path.join(self.ckpt_dir, STORE),
            resume=True,
            force=True,  # the collector has asked validate_resume; what changed all the same is recorded
            config={name: getattr(self.manifest, name) for name in SETTINGS},
            files=_hashes(self.manifest.model_ckpt),
            target=self.manifest.num_tasks_target or None,
            unique="seed",
            commit_trajectories=max(shard_size, 1),
            commit_every=flush_secs if flush_secs > 0 else None,
        )
        self._recorder = RouteRecorder(self._writer)
        self._reported: tuple[int, int] | None = None
        self._durable = self.manifest.current_seed, self.manifest.seeds_attempted
        self._seeds: list[int] = []
        self._last_saved = 0
        self._closed = False
        self._count()
        self.flush(force=True)
        atexit.register(_close, weakref.ref(self))

    def _refuse_fresh(self, stored: CheckpointManifest | None, given: CheckpointManifest | None) -> None:
        if stored is None or given is None or not stored.num_tasks_collected or given.num_tasks_collected:
            return
        raise AlreadyExistsError(
            f"{self.ckpt_dir} holds {stored.num_tasks_collected} routes, and this run does not go on with them",
            hint="collect with --resume, with --fresh, or into another --ckpt_dir",
        )

    def _import_shards(self) -> RoutesReport | None:
        """Take over a folder of the old kind, once."""
        storage = LocalStorage(self.ckpt_dir)
        if storage.size(f"{STORE}/{ROOT}") is not None or not _has_shards(self.shards_dir):
            return None
        print(f"{self.ckpt_dir}: taking the shards over into {STORE}, once; they are left as they are", file=sys.stderr)
        report = import_routes(
            self.ckpt_dir,
            os.path.join(self.ckpt_dir, STORE),
            dedupe="seed",
            unreadable="skip",
            progress=_print_progress if sys.stderr.isatty() else None,
        )
        print(report, file=sys.stderr)
        if report.unreadable or report.lost:
            warnings.warn(f"{self.ckpt_dir}: routes are missing\n{report}", stacklevel=4)
        return report

    @property
    def buffer(self) -> list[int]:
        """Seeds of the routes that are not committed yet."""
        missing = len(self._writer) - self._writer.committed
        return self._seeds[len(self._seeds) - missing :] if missing > 0 else []

    def append_route(
        self,
        seed: int,
        selected_ep: int,
        obs: Any,
        actions: Any,
        xy: Any,
        player_v: Any,
        ents_count: Any,
        nearest_ents: Any,
        rewards: Any,
        ep_len: int,
        ep_return: float,
        success: bool,
        diag: dict[str, Any] | None,
        all_episodes: list[dict[str, Any]] | None = None,
    ) -> None:
        """Store one route; dropped, and not counted, if its seed is stored already.

        Raises ``SchemaError`` if it does not fit the others, ``StorageError`` if an earlier one could not be written.
        """
        route: dict[str, Any] = {
            "routes_seed": np.int64(seed),
            "routes_selected_ep": np.int64(selected_ep),
            "routes_obs": obs,
            "routes_actions": actions,
            "routes_xy": xy,
            "routes_player_v": player_v,
            "routes_ents_count": ents_count,
            "routes_nearest_ents": nearest_ents,
            "routes_rewards": rewards,
            "routes_ep_len": np.int64(ep_len),
            "routes_return": np.float32(ep_return),
            "routes_success": np.bool_(success),
            "routes_diag": diag,
        }
        for key, value in route.items():
            if KEYS[key].kind == "array" and value is not None:
                route[key] = _native(value, np.dtype(KEYS[key].dtype))
        if all_episodes is not None:
            route[EPISODES] = all_episodes
        if self._recorder.append(route) is not None:
            if len(self._seeds) >= 4 * self.shard_size:
                del self._seeds[: -2 * self.shard_size]
            self._seeds.append(int(seed))
        self._count()
        self.flush()

    def update_progress(self, current_seed: int, seeds_attempted: int) -> None:
        """Report the end of the batch that is being stored, and the seeds tried so far.

        It becomes durable with the first commit after another batch has reported: until then routes of this one
        may be missing, and a resumed run repeats it.
        """
        report = int(current_seed), int(seeds_attempted)
        if self._reported is not None and self._reported[0] != report[0]:
            before, self._durable = self._durable[0], self._reported
            if self._durable[0] > before:
                self._writer.mark_attempted(range(before, self._durable[0]))
        self._reported = report
        self.manifest.current_seed, self.manifest.seeds_attempted = report
        self._note()

    def flush(self, force: bool = False) -> None:
        """With ``force``, make every route so far durable; they become so by themselves otherwise."""
        if force:
            self._note()
            self.manifest.shards_written = self._writer.commit()
        committed = self._writer.committed
        if force or committed != self._last_saved:
            self._last_saved = committed
            self._count()
            self.manifest.save(self.ckpt_dir)

    def close(self) -> None:
        """Commit and let go of the folder."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(force=True)
        finally:
            self._writer.close()

    def __enter__(self) -> RoutesShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TrajstoreError:
            if error is None:
                raise

    def _count(self) -> None:
        self.manifest.num_tasks_collected = len(self._writer)

    def _note(self) -> None:
        """Put the durable progress where the next commit takes it along."""
        if self.manifest.num_tasks_target and self._writer.target != self.manifest.num_tasks_target:
            self._writer.target = self.manifest.num_tasks_target
        current, tried = self._durable
        kept = routes_state(self._writer.state).get("meta")
        self._recorder.note(
            current_seed=current,
            seeds_attempted=tried,
            manifest=self.manifest._public(),
            meta=self.manifest._meta(kept if isinstance(kept, dict) else {}),
        )


def _close(writer: weakref.ref[RoutesShardWriter]) -> None:
    """A collector that ends without ``close`` loses nothing."""
    alive = writer()
    if alive is not None:
        alive.close()


def _native(value: Any, dtype: np.dtype[Any]) -> Array:
    """A collector's array in the dtype of the file, where that is of its kind (float64 rewards become float32)."""
    rows = np.asarray(value)
    if not rows.size and rows.dtype.kind in "fiub":
        return rows.astype(dtype)
    same_kind = rows.dtype.kind == dtype.kind or (rows.dtype.kind in "iu" and dtype.kind in "iu")
    return rows.astype(dtype) if same_kind and rows.dtype != dtype else rows


def _has_shards(folder: str) -> bool:
    """Whether there are shards of the old kind in a folder."""
    return any(name.startswith("shard_") and name.endswith(".npz") for name in os.listdir(folder))


def build_routes_npz_from_ckpt(
    ckpt_dir: str | os.PathLike[str],
    out_npz: str | os.PathLike[str],
    max_routes: int | None = None,
    keys: Iterable[str] | None = None,
    compress: bool = True,
    show_progress: bool = True,
    atomic: bool = True,
    tmp_dir: str | os.PathLike[str] | None = None,
) -> int:
    """Write what the folder holds as a ``routes.npz``, also while it is collected; the number of routes.

    A file that stands at ``out_npz`` is replaced. A folder of the old kind is read through a temporary store.
    """
    options: dict[str, Any] = {
        "max_routes": max_routes,
        "compress": compress,
        "progress": _print_progress if show_progress and sys.stderr.isatty() else None,
        "atomic": atomic,
        "tmp_dir": tmp_dir,
        "overwrite": True,
    }
    store = os.path.join(os.fspath(ckpt_dir), STORE)
    if LocalStorage(store).size(ROOT) is not None:
        return _export(store, out_npz, keys, options)
    if not os.path.isdir(ckpt_dir):
        raise NotFoundError(f"there is no folder {os.fspath(ckpt_dir)}", hint="give the --ckpt_dir of a collection")
    with tempfile.TemporaryDirectory(dir=tmp_dir, prefix="trajstore-build-") as folder:
        temporary = os.path.join(folder, STORE)
        report = import_routes(ckpt_dir, temporary, dedupe="seed")
        if len(str(report).splitlines()) > 1:
            print(report, file=sys.stderr)
        return _export(temporary, out_npz, keys, options)


def _export(store: str, out_npz: str | os.PathLike[str], keys: Iterable[str] | None, options: dict[str, Any]) -> int:
    """Export those of the keys that are there, as their builder does."""
    dataset = open_dataset(store)
    if keys is not None:
        there = RoutesView(dataset).keys
        keys = [key for key in keys if key in there]
    return export_routes(dataset, out_npz, keys=keys, **options).trajectories


def _print_progress(done: int, total: int) -> None:
    if done == total or done % 64 == 0:
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# --- command line ---------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``info`` and ``build`` with the flags of the old script; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trajstore.compat.routes_ckpt_storage", description="Look at and export collections of routes."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="how far a collection has come")
    build = commands.add_parser("build", help="write a routes.npz")
    for command in (info, build):
        command.add_argument("--ckpt_dir", required=True)
    build.add_argument("--out_npz", required=True)
    build.add_argument("--max_routes", type=int, default=None)
    build.add_argument("--mode", choices=list(MODES), default="full")
    build.add_argument("--no_compress", action="store_true")
    build.add_argument("--no_progress", action="store_true")
    build.add_argument("--no_atomic", action="store_true")
    build.add_argument("--tmp_dir", default=None)
    args = parser.parse_args(arguments)
    try:
        return _info(args.ckpt_dir) if args.command == "info" else _build(args)
    except TrajstoreError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1


def _info(ckpt_dir: str) -> int:
    manifest = CheckpointManifest.load(ckpt_dir)
    if manifest is None:
        raise NotFoundError(f"there is no collection in {ckpt_dir}", hint="check --ckpt_dir")
    print(f"collected:       {manifest.num_tasks_collected} / {manifest.num_tasks_target}")
    print(f"current seed:    {manifest.current_seed}")
    print(f"seeds attempted: {manifest.seeds_attempted}")
    print(f"shards written:  {manifest.shards_written}")
    for name in SETTINGS:
        print(f"{name + ':':<16} {getattr(manifest, name)}")
    lengths = _lengths(ckpt_dir)
    if len(lengths):
        print(f"route length:    min {lengths.min()}, max {lengths.max()}, mean {lengths.mean():.1f}")
    return 0


def _lengths(ckpt_dir: str) -> Array:
    store = LocalStorage(ckpt_dir).child(STORE)
    if store.size(ROOT) is not None:
        return open_dataset(store).lengths
    found = []
    for file in find_routes(ckpt_dir).files:
        with NpzReader(file) as reader:
            found.append(reader.read("routes_ep_len"))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _build(args: argparse.Namespace) -> int:
    chosen = MODES[args.mode]
    count = build_routes_npz_from_ckpt(
        args.ckpt_dir,
        args.out_npz,
        max_routes=args.max_routes,
        keys=chosen,
        compress=not args.no_compress,
        show_progress=not args.no_progress,
        atomic=not args.no_atomic,
        tmp_dir=args.tmp_dir,
    )
    print(f"{count} routes -> {args.out_npz}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
