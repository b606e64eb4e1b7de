"""``python -m bench.codecs``: what each codec makes of each kind of field, by chunk size; the ground of the profiles.

One core, one chunk a Blosc block. Rates are of raw bytes, and mean little on a machine that others use too; sizes do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import data
from trajstore.format.layout import Codec
from trajstore.media.shard import decode_frame, encode_frame

CODECS = (
    Codec("lz4", 5),
    Codec("lz4hc", 5),
    Codec("zstd", 1),
    Codec("zstd", 2),
    Codec("zstd", 3),
    Codec("zstd", 5),
    Codec("zstd", 7),
    Codec("zstd", 2, "bitshuffle"),
    Codec("zstd", 2, "noshuffle"),
)


def kinds() -> Iterator[tuple[str, np.ndarray[Any, Any], tuple[int, ...]]]:
    """Name, rows, and chunk sizes in KiB to try."""
    rng = np.random.default_rng(0)
    frames = data.frames(1_024)
    yield "frames, uint8 (float16 packed)", data.stored_frames(1_024), (32, 64, 128, 256)
    yield "frames, float16 as they come", frames, (32, 64, 128)
    noise = rng.normal(0, 0.01, frames[:256].shape)
    yield "frames, float16, noisy", (frames[:256] + noise).astype(np.float16), (64, 128)
    low = np.concatenate([rollout["obs"] for rollout in data.rollouts(100, 200)])
    yield "observations, 17 × float32", low, (16, 32, 64)
    weights = rng.normal(0, 0.06, (256, 256))
    inputs = frames.reshape(len(frames), -1)[:, ::48].astype(np.float64)
    hidden, state = [], np.zeros(256)
    for row in inputs:
        state = 0.7 * state + 0.3 * np.tanh(row + state @ weights)
        hidden.append(state)
    yield "hidden states, 256 × float16", np.array(hidden, np.float16), (32, 64)
    yield "hidden states, 256 × float32", np.array(hidden, np.float32), (32, 64)
    yield "actions, int64", rng.integers(0, 15, 40_000), (16, 32)
    rewards = np.zeros(40_000, np.float32)
    rewards[rng.integers(0, 40_000, 300)] = 10
    yield "rewards, float32, sparse", rewards, (16, 32)


def measure(rows: np.ndarray[Any, Any], codec: Codec, chunk_bytes: int) -> tuple[float, float, float]:
    """Bytes a row, and MB/s of encoding and of decoding."""
    row_bytes = rows[0].nbytes
    size = 1 << max((chunk_bytes // row_bytes).bit_length() - 1, 0)
    chunks = [np.ascontiguousarray(rows[at : at + size]) for at in range(0, len(rows) - size + 1, size)]
    codec = Codec(codec.cname, codec.clevel, codec.shuffle, size * row_bytes)
    rates = []
    frames: list[bytes] = []
    for _ in range(3):
        begun = time.process_time()
        frames = [encode_frame(chunk, codec) for chunk in chunks]
        middle = time.process_time()
        for frame, chunk in zip(frames, chunks):
            decode_frame(frame, chunk.reshape(-1).view(np.uint8))
        rates.append((middle - begun, time.process_time() - middle))
    raw = len(chunks) * size * row_bytes / 1e6
    encode, decode = (min(times) for times in zip(*rates))
    return sum(map(len, frames)) / (len(chunks) * size), raw / max(encode, 1e-9), raw / max(decode, 1e-9)


def main() -> None:
    print("| field | chunk | codec | bytes a row | of raw | encode MB/s | decode MB/s |")
    print("|---|---|---|---|---|---|---|")
    for name, rows, sizes in kinds():
        for kib in sizes:
            for codec in CODECS:
                size, encode, decode = measure(rows, codec, kib << 10)
                title = f"{codec.cname} {codec.clevel}" + ("" if codec.shuffle == "shuffle" else f" {codec.shuffle}")
                share = f"{size / rows[0].nbytes:.3f}"
                print(f"| {name} | {kib} KiB | {title} | {size:,.1f} | {share} | {encode:,.0f} | {decode:,.0f} |")


if __name__ == "__main__":
    main()
