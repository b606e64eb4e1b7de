"""Merging: eight stores by links against copying their files, and rewritten against a copy loop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench import data
from bench.rows import Bench, Claim, SkipRow, row
from trajstore.format.encoding import PROFILES
from trajstore.operations.merge import merge

_STORES = 8
_ROW = (64, 64, 3)


def _sources(folder: Path, frames: int, *, steps: int = 250) -> Path:
    """Eight stores of so many frames each, which no codec makes smaller."""
    draw = np.random.default_rng(0)
    block = draw.integers(0, 256, (steps, *_ROW), dtype=np.uint8)
    with trajstore.create(folder / "rank_0", profile="fast", handle_signals=False) as writer:
        for number in range(frames // steps):
            block[:, 0, 0, 0] = number
            writer.append(
                {"obs": block, "action": np.zeros((steps, 4), np.float32), "reward": np.zeros(steps)}, seed=number
            )
    for rank in range(1, _STORES):
        shutil.copytree(folder / "rank_0", folder / f"rank_{rank}")
    return folder


@row("merge-linked")
def merge_linked(bench: Bench) -> Iterator[Claim]:
    """Eight stores into one, by hard links; the peer copies their files, without a sync."""
    frames = 8_000 if bench.short else 20_000
    large = _sources(bench.scratch("merge.large"), frames)
    small = _sources(bench.scratch("merge.small"), frames // 4)
    size = sum(file.stat().st_size for file in large.rglob("*") if file.is_file())
    target = bench.folder / "merge.target"

    def merged(source: Path) -> Any:
        dataset = merge(source, target)
        return len(dataset), int(dataset.lengths.sum())

    def copied() -> Any:
        shutil.copytree(large, target)
        dataset = trajstore.open(target)
        return len(dataset), int(dataset.lengths.sum())

    def prepare(_: str) -> None:
        shutil.rmtree(target, ignore_errors=True)

    times = bench.compare({"trajstore": lambda: merged(large), "copying": copied}, prepare=prepare)
    what = f"merge of {_STORES} stores, {size / 1e9:.2g} GB, by links"
    yield times.claim(what, "copying", ">= 20")
    flat = bench.compare(
        {"trajstore": lambda: merged(large), "a quarter": lambda: merged(small)},
        prepare=prepare,
        check=lambda a, b: a[0] == b[0] * 4,
    )
    yield flat.claim(f"{what}: four times the bytes", "a quarter", "<= 2", note="and of the files")
    prepare("")
    merge(large, target)
    np.testing.assert_array_equal(trajstore.open(target)[-1]["obs"][:], trajstore.open(large)[-1]["obs"][:])
    for folder in (large, small, target):
        shutil.rmtree(folder)


@row("merge-rewritten")
def merge_rewritten(bench: Bench) -> Iterator[Claim]:
    """Eight stores of real frames into new files, without gaps; the peer is one loop that copies shard after shard."""
    try:
        import zarr
    except ImportError as error:
        raise SkipRow("zarr is not installed") from error
    frames = data.stored_frames(1_500 if bench.short else 6_000)
    folder, target = bench.scratch("rewrite.sources"), bench.folder / "rewrite.target"
    with trajstore.create(folder / "rank_0", handle_signals=False) as writer:
        for first in range(0, len(frames), 250):
            writer.append({"obs": frames[first : first + 250]})
    for rank in range(1, _STORES):
        shutil.copytree(folder / "rank_0", folder / f"rank_{rank}")
    layout = trajstore.open(folder / "rank_0").snapshots[0].manifest.arrays["steps/obs"][0]

    def ours(codec: str | None = None) -> Any:
        merged = merge(folder, target, rewrite=True, codec=codec)
        return merged.read("obs", np.array([0, len(merged) - 1]))

    def loop() -> Any:
        sources = [zarr.open_group(str(folder / f"rank_{rank}"), mode="r") for rank in range(_STORES)]
        pairs = [source["clocks/steps"][:] for source in sources]
        total = sum(int((found[:, 1] - found[:, 0]).sum()) for found in pairs)
        codec = PROFILES["balanced"]
        compressor = zarr.codecs.BloscCodec(cname=codec.cname, clevel=codec.clevel, shuffle=codec.shuffle)
        new = zarr.create_array(
            store=str(target),
            shape=(total, *layout.row_shape),
            dtype=layout.dtype,
            chunks=(layout.chunk_rows, *layout.row_shape),
            shards=(layout.shard_rows, *layout.row_shape),
            compressors=compressor,
        )
        position, buffered, waiting = 0, 0, []
        for source, found in zip(sources, pairs):
            rows = source["steps/obs"]
            for start in range(int(found[0, 0]), int(found[-1, 1]), layout.shard_rows):
                waiting.append(rows[start : min(start + layout.shard_rows, int(found[-1, 1]))])
                buffered += len(waiting[-1])
                while buffered >= layout.shard_rows:  # whole shards: a partial write would read its shard again
                    joined = np.concatenate(waiting)
                    new[position : position + layout.shard_rows] = joined[: layout.shard_rows]
                    position += layout.shard_rows
                    waiting, buffered = [joined[layout.shard_rows :]], buffered - layout.shard_rows
        if buffered:
            new[position:] = np.concatenate(waiting)
        return np.concatenate((new[:250], new[total - 250 :]))

    def prepare(_: str) -> None:
        shutil.rmtree(target, ignore_errors=True)

    work = {"trajstore": ours, "encoded": lambda: ours("balanced"), "zarr-python": loop}
    times = bench.compare(work, prepare=prepare, repeats=2 if bench.short else 3)
    what = f"merge of {_STORES} stores, {_STORES * len(frames):,} frames, into new files"
    yield times.claim(what, "zarr-python", ">= 5", note="chunks that stay whole are moved")
    yield times.claim(f"{what}, encoded anew", "zarr-python", ours="encoded", note="as with another codec")
    shutil.rmtree(folder)
    prepare("")
