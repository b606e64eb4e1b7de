"""Routes into a store: ``routes.npz`` files and ``ckpt_shards_v1`` folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trajstore.errors import FormatError, NotFoundError, SchemaError, TrajstoreError
from trajstore.npz import NpzReader
from trajstore.operations.assembly import located, refuse_existing
from trajstore.operations.filling import new_store
from trajstore.routes import (
    META,
    META_KEYS,
    SETTINGS,
    RouteRecorder,
    RoutesSource,
    check_keys,
    find_routes,
    known_dtype,
    path_of,
)

__all__ = ["RoutesReport", "import_routes"]


@dataclass
class RoutesReport:
    """What an import found; printable.

    Attributes
    ----------
    destination : the store.
    routes, steps : stored.
    files : read.
    unlisted : shards that the manifest does not count. missing : shards that it counts and that are not there.
    temporaries : files of interrupted writes; not read.
    unreadable : file and reason of those left out (``unreadable="skip"``).
    duplicate_seeds : seeds that stand more than once. dropped : routes left out for that (``dedupe="seed"``).
    unboxed : keys that held Python numbers, by file, and came back as arrays.
    manifest_routes : how many routes the manifest counts, ``None`` without one; if there are more than found, those
        beyond were lost by the collector.
    current_seed, seeds_attempted : where a collector goes on; before the manifest's seed if routes were lost.
    notes : anything else, in words.
    """

    destination: str = ""
    routes: int = 0
    steps: int = 0
    files: int = 0
    unlisted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    temporaries: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicate_seeds: list[int] = field(default_factory=list)
    dropped: int = 0
    unboxed: dict[str, list[str]] = field(default_factory=dict)
    manifest_routes: int | None = None
    current_seed: int | None = None
    seeds_attempted: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Routes that the manifest counts beyond those found."""
        return max((self.manifest_routes or 0) - self.routes - self.dropped, 0)

    def __str__(self) -> str:
        lines = [f"{self.routes} routes, {self.steps} steps from {self.files} files -> {self.destination}"]
        for label, found in (
            ("not counted by the manifest", self.unlisted),
            ("counted by the manifest, not there", self.missing),
            ("temporary, not read", self.temporaries),
            ("unreadable, left out", [f"{name}: {reason}" for name, reason in self.unreadable]),
            ("seeds that stand twice", [str(seed) for seed in self.duplicate_seeds]),
            ("un-boxed", [f"{name}: {', '.join(keys)}" for name, keys in self.unboxed.items()]),
        ):
            if found:
                lines.append(f"  {label} ({len(found)}): " + "; ".join(found))
        if self.dropped:
            lines.append(f"  routes dropped as repetitions of a seed: {self.dropped}")
        if self.manifest_routes is not None and self.manifest_routes != self.routes + self.dropped:
            lines.append(
                f"  the manifest counts {self.manifest_routes} routes, the files hold {self.routes + self.dropped}"
            )
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def import_routes(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    dedupe: str | None = None,
    unreadable: str = "fatal",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> RoutesReport:
    """Make a store of ``routes.npz`` files, ``ckpt_shards_v1`` folders, or a list of both.

    Parameters
    ----------
    source : is read only. A manifest is not trusted: the shards are, and the report says what differs.
    destination : a new store; it appears whole or not at all.
    dedupe : ``"seed"`` keeps the first route of each seed.
    unreadable : ``"fatal"``, or ``"skip"`` to leave out files that are damaged; these are then read twice, once
        to check them.
    progress : is called with routes read and routes there are.
    options : of :func:`trajstore.create` (``profile``, ``threads``, …).

    Returns
    -------
    RoutesReport

    Raises
    ------
    NotFoundError, AlreadyExistsError : nothing to read, or the destination exists.
    FormatError, CorruptionError : a file is not what it should be; the message names file and key.
    SchemaError : routes that do not fit one another, or a dict that JSON cannot give back.

    Notes
    -----
    Memory is bounded by the writer's queue and the largest route, whatever the size of the files.
    """
    if dedupe not in (None, "seed"):
        raise SchemaError(f"dedupe={dedupe!r}", hint="dedupe is None or 'seed'")
    if unreadable not in ("fatal", "skip"):
        raise SchemaError(f"unreadable={unreadable!r}", hint="unreadable is 'fatal' or 'skip'")
    places = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    sources = [find_routes(place) for place in places]
    refuse_existing(*located(destination))  # before all files are looked at
    return _Import(sources, os.fspath(destination), dedupe, unreadable, progress, options).run()


# --- the import -------------------------------------------------------------------------------


class _Import:
    def __init__(
        self,
        sources: list[RoutesSource],
        destination: str,
        dedupe: str | None,
        unreadable: str,
        progress: Callable[[int, int], None] | None,
        options: dict[str, Any],
    ) -> None:
        self._sources = sources
        self._dedupe = dedupe
        self._skip = unreadable == "skip"
        self._progress = progress
        self._options = options
        self._report = RoutesReport(destination)
        self._seeds: set[int] = set()
        self._last_seed: int | None = None
        self._read = 0
        self._meta: dict[str, Any] = {}

    def run(self) -> RoutesReport:
        looked = [self._look(path) for source in self._sources for path in source.files]
        readable = [file for file in looked if file is not None]
        total = sum(file.routes for file in readable)
        if not total:
            raise NotFoundError(f"there are no routes in {', '.join(s.path for s in self._sources)}")
        natives = _native_dtypes(readable)
        with new_store(self._report.destination, **self._settings()) as writer:
            recorder = RouteRecorder(writer)
            for file in readable:
                self._import_file(file, recorder, natives, total)
            self._finish(recorder)
        return self._report

    def _look(self, path: str) -> _File | None:
        """Open a file, and in skipping mode check all of it; ``None`` if it is to be left out."""
        try:
            with NpzReader(path) as reader:
                file = _describe(reader)
                if self._skip:
                    reader.check()
                if META in reader and not self._meta:
                    meta = reader.read(META).item()
                    self._meta = meta if isinstance(meta, dict) else {}
        except TrajstoreError as error:
            if not self._skip:
                raise
            self._report.unreadable.append((os.path.basename(path), error.message))
            return None
        return file

    def _settings(self) -> dict[str, Any]:
        """How the store is created."""
        manifest = self._sources[0].manifest
        known = {**self._meta, **manifest}
        config = {key: known[key] for key in SETTINGS if key in known}
        target = known.get("num_tasks_target")
        return {
            "config": config,
            "target": int(target) if isinstance(target, (int, np.integer)) else None,
            "unique": "seed" if self._dedupe else None,
            **self._options,
        }

    def _import_file(self, file: _File, recorder: RouteRecorder, natives: dict[str, np.dtype[Any]], total: int) -> None:
        if file.boxed:
            self._report.unboxed[os.path.basename(file.path)] = list(file.boxed)
        with NpzReader(file.path) as reader:
            for route in _routes(reader, file, self._dtypes(recorder, natives)):
                self._append(recorder, route, file.path)
                self._read += 1
                if self._progress is not None:
                    self._progress(self._read, total)
        self._report.files += 1

    def _dtypes(self, recorder: RouteRecorder, natives: dict[str, np.dtype[Any]]) -> Callable[[str], Any]:
        """What a boxed key becomes: what the store holds, else what other files hold, else what collectors write."""
        fields = recorder.writer.schema.fields

        def dtype(key: str) -> Any:
            spec = fields.get(path_of(key))
            if spec is not None and not spec.whole:
                return spec.in_memory
            return natives.get(key, known_dtype(key))

        return dtype

    def _append(self, recorder: RouteRecorder, route: dict[str, Any], file: str) -> None:
        seed = int(route["routes_seed"])
        try:
            number = recorder.append(route)
        except SchemaError as error:
            where = f"{file}, the route of seed {seed}"
            raise SchemaError(f"{where}: {error.message}", hint=error.hint) from error
        if seed in self._seeds:
            self._report.duplicate_seeds.append(seed)
        self._seeds.add(seed)
        self._last_seed = seed if self._last_seed is None else max(seed, self._last_seed)
        self._report.dropped += number is None

    def _finish(self, recorder: RouteRecorder) -> None:
        report, writer = self._report, recorder.writer
        report.routes, report.steps = len(writer), writer.steps
        for source in self._sources:
            for name in ("unlisted", "missing", "temporaries", "notes"):
                getattr(report, name).extend(getattr(source, name))
        counts: list[Any] = [source.manifest.get("num_tasks_collected") for source in self._sources]
        if all(map(_is_int, counts)):
            report.manifest_routes = sum(counts)
        self._progress_of(recorder)

    def _progress_of(self, recorder: RouteRecorder) -> None:
        """Where a collector goes on: where the manifest says, or behind the last seed found if routes were lost."""
        report = self._report
        known = [{**(self._meta if i == 0 else {}), **s.manifest} for i, s in enumerate(self._sources)]
        tried = [entry["seeds_attempted"] for entry in known if _is_int(entry.get("seeds_attempted"))]
        report.seeds_attempted = int(sum(tried)) if tried else None
        manifest = self._sources[0].manifest
        if len(self._sources) == 1 and _is_int(manifest.get("current_seed")):
            current = int(manifest["current_seed"])
            first = current - (report.seeds_attempted or 0)
            if report.lost and self._last_seed is not None and self._last_seed + 1 < current:
                report.notes.append(
                    f"the manifest counts {report.lost} routes that no shard holds: "
                    f"a collector goes on at seed {self._last_seed + 1}, not {current}"
                )
                current = self._last_seed + 1
                report.seeds_attempted = max(current - first, 0)
            report.current_seed = current
            recorder.writer.mark_attempted(range(min(first, current), current))
        recorder.note(
            meta=self._meta_template(),
            current_seed=report.current_seed,
            seeds_attempted=report.seeds_attempted,
            manifest=_plain(manifest),
        )

    def _meta_template(self) -> dict[str, Any] | None:
        """The file's own ``meta``, or what their builder makes of a manifest."""
        if self._meta:
            return self._meta
        manifest = self._sources[0].manifest
        if not manifest:
            return None
        meta = {key: manifest.get(key) for key in META_KEYS}
        meta["seed_offset"] = manifest.get("seed_offset", 0)
        meta["require_success"] = bool(meta["require_success"])
        meta["num_tasks_collected"] = self._report.routes
        return meta


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        str(key): value for key, value in manifest.items() if isinstance(value, (str, int, float, bool, type(None)))
    }


@dataclass(frozen=True)
class _File:
    """One file: the keys of its routes, those of them that are boxed, and how many routes it holds."""

    path: str
    keys: tuple[str, ...]
    boxed: tuple[str, ...]
    routes: int


def _describe(reader: NpzReader) -> _File:
    """Look at a file's headers. Raises ``FormatError`` if its keys do not agree on the number of routes."""
    if "routes_seed" not in reader:
        raise FormatError(
            f"{reader.path} has no key 'routes_seed'", hint="it is no routes.npz; it has " + ", ".join(reader.names)
        )
    keys = check_keys(reader.names)
    count = 0
    for i, key in enumerate(keys):
        shape = reader.member(key).shape
        if not shape or (i and shape[0] != count):
            raise FormatError(f"{reader.path}: key {key!r} has the shape {shape}, others have {count} routes")
        count = shape[0]
    return _File(reader.path, tuple(keys), tuple(key for key in keys if _is_boxed(reader, key)), count)


def _is_boxed(reader: NpzReader, key: str) -> bool:
    member = reader.member(key)
    return member.dtype.hasobject and len(member.shape) > 1 and known_dtype(key) is not None


def _native_dtypes(files: list[_File]) -> dict[str, np.dtype[Any]]:
    """The dtypes of the elements of each key, as the first file says that does not hold it boxed."""
    natives: dict[str, np.dtype[Any]] = {}
    wanted: set[str] = set()
    if not files[0].boxed:
        return natives  # the store's own schema will say
    for file in files:
        wanted |= set(file.boxed)
        asked = [key for key in file.keys if key in wanted and key not in file.boxed and key not in natives]
        if asked:
            with NpzReader(file.path) as reader:
                for key in asked:
                    first = next(iter(reader.iterate(key)), None)
                    if isinstance(first, np.ndarray) and first.size:
                        natives[key] = first.dtype
        if wanted <= natives.keys():
            break
    return natives


def _routes(reader: NpzReader, file: _File, dtype: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """The routes of a file, one dict each, all keys streamed side by side."""
    streams = {
        key: reader.iterate(key, dtype=dtype(key)) if reader.member(key).dtype.hasobject else iter(reader.read(key))
        for key in file.keys
    }
    for _ in range(file.routes):
        yield {key: next(stream) for key, stream in streams.items()}
    for stream in streams.values():
        for extra in stream:  # reaching the end is what compares the checksum
            raise FormatError(f"{reader.path} holds more than its header says: {type(extra).__name__}")
