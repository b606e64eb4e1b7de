"""HDF5: moving compressed chunks against h5py compressing the same rows with the same filter."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import trajstore
from bench.rows import Bench, Claim, Ratio, SkipRow, row

_ROW = (64, 64, 3)
_STEPS = 500


@row("hdf5")
def hdf5(bench: Bench) -> Iterator[Claim]:
    """A store of frames into one HDF5 file; the peer reads it with the same reader and writes it with h5py."""
    try:
        import h5py
        import hdf5plugin
    except ImportError as error:
        raise SkipRow("h5py and hdf5plugin are not installed") from error
    from trajstore.exporters.hdf5 import export_hdf5

    source = bench.scratch("hdf5.source") / "run.zarr"
    draw = np.random.default_rng(0)
    scene = draw.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with trajstore.create(source, handle_signals=False) as writer:
        for number in range(20 if bench.short else 80):
            noise = draw.integers(0, 4, (_STEPS, *_ROW), np.uint8)
            writer.append({"obs": scene + noise, "action": np.zeros((_STEPS, 4), np.float32)}, seed=number)
    dataset = trajstore.open(source, cache_bytes=0)
    layout = dataset.snapshots[0].reader("steps/obs").layout
    target = bench.folder / "hdf5.h5"

    def ours() -> Any:
        export_hdf5(dataset, target)
        return checked()

    def theirs() -> Any:
        codec = layout.codec
        filters = hdf5plugin.Blosc(cname=codec.cname, clevel=codec.clevel, shuffle=codec.shuffle_code)
        with h5py.File(target, "w", libver="latest") as file:
            for name, chunk in (("obs", layout.chunk_rows), ("action", 1024)):
                rows = dataset.steps[name]
                out = file.create_dataset(
                    f"steps/{name}", rows.shape, rows.dtype, chunks=(chunk, *rows.shape[1:]), **filters
                )
                for start in range(0, len(rows), 1024):
                    out[start : start + 1024] = rows[start : start + 1024]
        return checked()

    def checked() -> int:
        with h5py.File(target, "r") as file:
            return zlib.crc32(file["steps/obs"][-64:])

    times = bench.compare(
        {"trajstore": ours, "h5py, same filter": theirs}, prepare=lambda _: target.unlink(missing_ok=True)
    )
    yield times.claim("a store into one HDF5 file, verified and synced", "h5py, same filter", ">= 1.8")


@row("hdf5-view")
def foreign_files(bench: Bench) -> Iterator[Claim]:
    """A robomimic and a Minari file of 1 GB, opened where they lie and sliced; against 50 ms."""
    try:
        import h5py
    except ImportError as error:
        raise SkipRow("h5py is not installed") from error
    from trajstore.view import view

    count = 10 if bench.short else 160
    frames = np.random.default_rng(0).integers(0, 256, (_STEPS + 1, *_ROW), np.uint8)
    for kind in ("robomimic", "minari"):
        path = bench.scratch(f"view.{kind}") / "main_data.hdf5"
        with h5py.File(path, "w") as file:
            for number in range(count):
                if kind == "robomimic":
                    demo = file.create_group(f"data/demo_{number}")
                    demo.attrs["num_samples"] = _STEPS
                    demo["obs/image"] = frames[:-1]
                else:
                    demo = file.create_group(f"episode_{number}")
                    demo.attrs["total_steps"] = _STEPS
                    demo["observations/image"] = frames
                demo["actions"] = np.zeros((_STEPS, 4), np.float32)
        name = "obs/image" if kind == "robomimic" else "observations/image"

        def sliced(path: Any = path, name: str = name) -> Any:
            with view(path) as found:
                return found[count // 2][name][200:216]

        if not np.array_equal(sliced(), frames[200:216]):
            raise ValueError(f"the {kind} file gave other frames")
        times = bench.compare({"trajstore": sliced})
        ratio = Ratio.of([seconds / 0.05 for seconds in times.seconds["trajstore"]])
        note = f"{times.median() * 1e3:.1f} ms; the file has {path.stat().st_size / 1e9:.2f} GB"
        yield Claim(f"16 rows of a {kind} file, opened in place", "50 ms", ratio, "<= 1", note)
        path.unlink()
