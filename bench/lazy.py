"""What analysts do: one route, one key, one batch; files in and out; and what cold data takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore.dataset  # code is no part of what a call takes
from bench import data
from bench.peers import users_layout
from bench.rows import OURS, Bench, Claim, Ratio, fresh_peak, row

NPZ = "np.load of routes.npz"


def _routes_npz(bench: Bench, routes: list[dict[str, Any]]) -> Path:
    """One routes.npz, as the users' merge makes it: all routes of every key in one pickle."""
    path = bench.folder / "routes.npz"
    if not path.exists():
        first = routes[0]
        arrays = {
            f"routes_{name}": users_layout.column([r[name] for r in routes])
            if np.ndim(first[name])
            else np.array([r[name] for r in routes])
            for name in first
        }
        meta = np.empty((), object)
        meta[()] = {"env_name": "coinrun", "num_tasks_collected": len(routes)}
        np.savez_compressed(path, **arrays, meta=meta)
    return path


def _setting(bench: Bench) -> tuple[Path, Path, list[dict[str, Any]]]:
    routes = data.routes(4_000 if bench.short else 40_000)  # 1 GB of float16 frames in the full run
    npz, store = _routes_npz(bench, routes), bench.folder / "lazy.zarr"
    if not store.exists():
        with trajstore.create(store, commit_every=None) as writer:
            for route in routes:
                fields, columns = data.trajectory(route)
                writer.append(fields, **columns)
    return npz, store, routes


def route_of_store(store: Path, number: int, field: str) -> Any:
    return trajstore.open(store)[number][field][:]


def route_of_file(npz: Path, number: int, field: str) -> Any:
    with np.load(npz, allow_pickle=True) as file:
        return file[f"routes_{field}"][number]


def batch_of_store(store: Path, length: int) -> Any:
    dataset = trajstore.open(store)
    return dataset.read("obs", np.flatnonzero(dataset.lengths == length)[:16])


def batch_of_file(npz: Path, length: int) -> Any:
    with np.load(npz, allow_pickle=True) as file:
        chosen = np.flatnonzero(file["routes_ep_len"] == length)[:16]
        frames = file["routes_obs"]
        return np.concatenate([frames[i] for i in chosen])


@row("lazy")
def lazy(bench: Bench) -> Iterator[Claim]:
    """One route, one small key, one batch of routes of one length, from a closed file each time."""
    npz, store, routes = _setting(bench)
    number = len(routes) * 2 // 3
    length = len(routes[number]["obs"])
    for title, ours, theirs, arguments in (
        ("one route's frames", route_of_store, route_of_file, (number, "obs")),
        ("one route, one small key", route_of_store, route_of_file, (number, "rewards")),
        ("a batch of 16 routes of one length", batch_of_store, batch_of_file, (length,)),
    ):
        work = {
            "trajstore": lambda ours=ours, arguments=arguments: ours(store, *arguments),
            NPZ: lambda theirs=theirs, arguments=arguments: theirs(npz, *arguments),
        }
        times = bench.compare(work, repeats=min(bench.repeats, 3))
        note = f"{times.median() * 1e3:.1f} ms against {times.median(NPZ) * 1e3:,.0f} ms"
        yield times.claim(f"{title}, time", NPZ, ">= 20", note=note)
        rounds = [
            {"trajstore": fresh_peak(ours, store, *arguments), NPZ: fresh_peak(theirs, npz, *arguments)}
            for _ in range(1 if bench.short else 2)  # hardly differs
        ]
        ratio = Ratio.of([peaks[NPZ] / max(peaks["trajstore"], 1) for peaks in rounds])
        peaks = {name: max(peaks[name] for peaks in rounds) for name in rounds[0]}
        yield Claim(f"{title}, peak memory in a fresh process", NPZ, ratio, ">= 20", "", peaks)


@row("routes")
def routes_in_and_out(bench: Bench) -> Iterator[Claim]:
    """Import of the users' shards, and export of routes.npz against their merge of shards."""
    from trajstore.exporters.routes import export_routes
    from trajstore.importers.routes import import_routes

    routes = _setting(bench)[2]
    routes = routes[: 100 if bench.short else 400]
    folder = bench.scratch("shards")
    users_layout.write(folder, routes)
    target, out = bench.folder / "imported.zarr", bench.folder / "exported.npz"

    def prepare(_: str) -> None:
        shutil.rmtree(target, ignore_errors=True)
        out.unlink(missing_ok=True)

    def load_all() -> None:
        for path in sorted(folder.glob("shard_*.npz")):
            with np.load(path, allow_pickle=True) as file:
                for name in file.files:
                    file[name]

    def import_all() -> None:
        import_routes(folder, target)

    times = bench.compare({"trajstore": import_all, "np.load of the shards": load_all}, prepare=prepare)
    yield times.claim("import of ckpt_shards_v1", "np.load of the shards", "<= 1.3")
    import_all()

    def merge() -> None:
        found: dict[str, list[Any]] = {}
        for path in sorted(folder.glob("shard_*.npz")):
            with np.load(path, allow_pickle=True) as file:
                for name in file.files:
                    found.setdefault(name, []).append(file[name])
        np.savez_compressed(out, **{name: np.concatenate(parts) for name, parts in found.items()})

    def export_all() -> None:
        export_routes(target, out)

    work = {"trajstore": export_all, "their merge of shards": merge}
    times = bench.compare(work, prepare=lambda _: out.unlink(missing_ok=True), repeats=2)
    yield times.claim("export of routes.npz", "their merge of shards", ">= 1.5")
    largest = max(route["obs"].nbytes for route in routes)
    peaks = [fresh_peak(export_routes, target, bench.folder / f"out{i}.npz") for i in range(1 if bench.short else 2)]
    ratio = Ratio.of([peak / (300e6 + largest) for peak in peaks])
    note = f"{sum(route['obs'].nbytes for route in routes) / 1e6:,.0f} MB of frames"
    peer = "300 MB and the largest trajectory"
    yield Claim("export of routes.npz, peak memory in a fresh process", peer, ratio, "<= 1", note, {OURS: max(peaks)})


@row("cold-size")
def cold_size(bench: Bench) -> Iterator[Claim]:
    """Bytes after ``compact``, against the users' compressed files."""
    from trajstore.operations.compact import compact

    routes = data.routes(2_300)
    store, cold, users = bench.scratch("cold") / "s", bench.folder / "cold" / "c", bench.scratch("cold.users")
    with trajstore.create(store, commit_every=None) as writer:
        for route in routes:
            fields, columns = data.trajectory(route)
            writer.append(fields, **columns)
    compact(store, cold)
    users_layout.write(users, routes)
    if not np.array_equal(trajstore.open(cold).read("obs"), users_layout.read_frames(users)):
        raise ValueError("the compacted store holds other frames")
    steps = sum(len(route["obs"]) for route in routes)
    size, theirs = users_layout.nbytes(cold), users_layout.nbytes(users)
    note = f"{size / steps:,.0f} bytes a step against {theirs / steps:,.0f}"
    yield Claim("bytes a step after compact", "np.savez_compressed", Ratio.of([size / theirs]), "<= 0.75", note)
