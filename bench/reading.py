"""Whole scans, random steps and windows, on the same store and against each peer's own best chunking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench import data
from bench.rows import Bench, Claim, SkipRow, row
from trajstore.engine.snapshot import Snapshot
from trajstore.format.encoding import PROFILES
from trajstore.media.storage import LocalStorage

_FIELD = "steps/obs"


def _store(bench: Bench, profile: str, steps: int) -> Path:
    """A store of real frames, float16 in the hand and packed on disk; made once for each profile."""
    path = bench.folder / f"frames.{profile}.{steps}"
    if not path.exists():
        with trajstore.create(path, profile=profile) as writer:
            for route in data.routes(steps):
                writer.append({"obs": route["obs"]})
    return path


def _steps(bench: Bench) -> int:
    return 1_000 if bench.short else 8_000


def _peers(call: dict[str, Callable[[], Any]], optional: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Any]:
    """The contestants whose packages are here."""
    found = dict(call)
    for name, make in optional.items():
        try:
            found[name] = make()
        except ImportError:
            continue
    if len(found) == len(call):
        raise SkipRow("no peer is installed: pip install 'trajstore[bench]'")
    return found


@row("scan")
def scan(bench: Bench) -> Iterator[Claim]:
    """A whole field of one store, as it is stored (uint8), by every reader of Zarr."""
    for profile in ("fast", "balanced"):
        path = _store(bench, profile, _steps(bench))
        reader = Snapshot.of(LocalStorage(path)).reader(_FIELD)

        def zarr_python(path: Path = path) -> Callable[[], Any]:
            import zarr

            array = zarr.open_group(str(path), mode="r")[_FIELD]
            return lambda: array[:]

        def zarrs(path: Path = path) -> Callable[[], Any]:
            import zarr

            from bench.peers import zarr_python

            with zarr_python.zarrs():
                array = zarr.open_group(str(path), mode="r")[_FIELD]
            return lambda: array[:]

        def tensorstore(path: Path = path) -> Callable[[], Any]:
            from bench.peers import tensorstore_

            array = tensorstore_.opened(path / _FIELD)
            return lambda: array.read().result()

        work = _peers(
            {"trajstore": lambda reader=reader: reader.read(0, reader.rows)},
            {"zarr-python": zarr_python, "zarrs": zarrs, "TensorStore": tensorstore},
        )
        times = bench.compare(work)
        size = reader.rows * reader.layout.row_bytes / times.median() / 1e9
        bars = {"zarr-python": ">= 8", "TensorStore": ">= 2.2", "zarrs": ">= 1"}
        for peer, bar in bars.items():
            if peer in work:
                yield times.claim(f"scan of a field, same store ({profile})", peer, bar, note=f"{size:.2f} GB/s")


@row("scan-own")
def scan_own(bench: Bench) -> Iterator[Claim]:
    """The same frames as float16 values: ours packed, the peers' stored as float16 at their best chunking."""
    steps = _steps(bench)
    path = _store(bench, "fast", steps)
    reader = Snapshot.of(LocalStorage(path)).field("obs")
    rows = np.concatenate([route["obs"] for route in data.routes(steps)])
    codec = PROFILES["fast"]

    def zarr_python() -> Callable[[], Any]:
        from bench.peers import zarr_python

        zarr_python.create(bench.folder / "zarr.scan", rows, chunk=256, shard=None, codec=codec)
        array = zarr_python.opened(bench.folder / "zarr.scan")
        return lambda: array[:]

    def tensorstore() -> Callable[[], Any]:
        from bench.peers import tensorstore_

        tensorstore_.create(bench.folder / "ts.scan", rows, chunk=64, codec=codec)
        array = tensorstore_.opened(bench.folder / "ts.scan")
        return lambda: array.read().result()

    work = _peers(
        {"trajstore": lambda: reader.read(0, reader.rows)}, {"zarr-python": zarr_python, "TensorStore": tensorstore}
    )
    times = bench.compare(work)
    note = f"{reader.rows * 24576 / times.median() / 1e9:.2f} GB/s of float16"
    for peer, bar in {"zarr-python": ">= 4", "TensorStore": ">= 2"}.items():
        if peer in work:
            yield times.claim("scan of float16 frames, their own chunking", peer, bar, note=note)


@row("random")
def random_steps(bench: Bench) -> Iterator[Claim]:
    """256 random frames: cold against peers that store one frame a chunk, warm against an uncompressed memory map."""
    steps = _steps(bench)
    rows = np.concatenate([route["obs"] for route in data.routes(steps)])
    rng = np.random.default_rng(0)
    for profile in ("fast", "balanced"):
        codec = PROFILES[profile]
        cold = trajstore.open(_store(bench, profile, steps), cache_bytes=0).snapshots[0].field("obs")
        chosen = rng.integers(0, len(rows), 256)

        def zarr_python(codec: Any = codec, chosen: Any = chosen) -> Callable[[], Any]:
            from bench.peers import zarr_python

            zarr_python.create(bench.folder / "zarr.random", rows, chunk=1, shard=None, codec=codec)
            array = zarr_python.opened(bench.folder / "zarr.random")
            return lambda: zarr_python.rows_of(array, chosen)

        def tensorstore(codec: Any = codec, chosen: Any = chosen) -> Callable[[], Any]:
            from bench.peers import tensorstore_

            tensorstore_.create(bench.folder / "ts.random", rows, chunk=1, codec=codec)
            array = tensorstore_.opened(bench.folder / "ts.random")
            return lambda: array[chosen].read().result()

        work = _peers(
            {"trajstore": lambda cold=cold, chosen=chosen: cold.take(chosen)},
            {"zarr-python": zarr_python, "TensorStore": tensorstore},
        )
        times = bench.compare(work)
        for peer, bar in {"zarr-python": ">= 20", "TensorStore": ">= 3"}.items():
            if peer in work:
                note = f"{times.median() * 1e3:.1f} ms"
                yield times.claim(f"256 random frames, cold ({profile})", peer, bar, note=note)
    rows.tofile(bench.folder / "memmap")
    mapped = np.memmap(bench.folder / "memmap", np.float16, "r", shape=rows.shape)
    warm = trajstore.open(_store(bench, "balanced", steps), cache_bytes=1 << 30).snapshots[0].field("obs")
    chosen = rng.integers(0, len(rows), 256)
    times = bench.compare({"trajstore": lambda: warm.take(chosen), "memmap": lambda: mapped[chosen]}, inner=5)
    yield times.claim("256 random frames, warm cache", "memmap", "<= 2", note=f"{times.median() * 1e3:.2f} ms")


@row("windows")
def windows(bench: Bench) -> Iterator[Claim]:
    """64 windows of 16 frames at random places."""
    steps = _steps(bench)
    rows = np.concatenate([route["obs"] for route in data.routes(steps)])
    starts = np.random.default_rng(0).integers(0, len(rows) - 16, 64)
    chosen = (starts[:, None] + np.arange(16)).reshape(-1)
    for profile in ("fast", "balanced"):
        codec = PROFILES[profile]
        cold = trajstore.open(_store(bench, profile, steps), cache_bytes=0).snapshots[0].field("obs")

        def zarr_python(codec: Any = codec) -> Callable[[], Any]:
            from bench.peers import zarr_python

            zarr_python.create(bench.folder / "zarr.windows", rows, chunk=16, shard=None, codec=codec)
            array = zarr_python.opened(bench.folder / "zarr.windows")
            return lambda: np.concatenate([array[start : start + 16] for start in starts.tolist()])

        def tensorstore(codec: Any = codec) -> Callable[[], Any]:
            from bench.peers import tensorstore_

            tensorstore_.create(bench.folder / "ts.windows", rows, chunk=8, codec=codec)
            array = tensorstore_.opened(bench.folder / "ts.windows")

            def read() -> Any:
                parts = [array[start : start + 16].read() for start in starts.tolist()]
                return np.concatenate([part.result() for part in parts])

            return read

        work = _peers(
            {"trajstore": lambda cold=cold: cold.take(chosen)}, {"zarr-python": zarr_python, "TensorStore": tensorstore}
        )
        times = bench.compare(work)
        for peer, bar in {"zarr-python": ">= 12", "TensorStore": ">= 1.8"}.items():
            if peer in work:
                note = f"{times.median() * 1e3:.1f} ms"
                yield times.claim(f"64 windows of 16 frames, cold ({profile})", peer, bar, note=note)
