"""zarr-python 3, with its own codec pipeline or with that of zarrs.

Its performance guide names ``async.concurrency`` and ``threading.max_workers``, chunks and shards. From 4 to 64 at once
made no difference on local files, so its own settings stand; the chunks are those at which it was fastest. Unsorted
rows are asked for in their order, which takes a fifth less than ``oindex`` does to sort them by itself. Of zarrs the
same holds for ``chunk_concurrent_minimum`` from 1 to 8; both check what trajstore checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from trajstore.format.layout import Codec


def blosc(codec: Codec) -> BloscCodec:
    return BloscCodec(cname=codec.cname, clevel=codec.clevel, shuffle=codec.shuffle)


def create(path: Path, rows: np.ndarray[Any, Any], *, chunk: int, shard: int | None, codec: Codec) -> None:
    """One array, written in one assignment, as the documentation advises."""
    array = zarr.create_array(
        store=str(path),
        shape=rows.shape,
        dtype=rows.dtype,
        chunks=(chunk, *rows.shape[1:]),
        shards=None if shard is None else (shard, *rows.shape[1:]),
        compressors=blosc(codec),
        overwrite=True,
    )
    array[:] = rows


def opened(path: Path) -> Any:
    return zarr.open_array(str(path), mode="r")


def rows_of(array: Any, numbers: np.ndarray[Any, Any]) -> Any:
    """Rows by number, in any order."""
    order = np.argsort(numbers, kind="stable")
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return array.oindex[numbers[order]][back]


@contextmanager
def zarrs() -> Iterator[None]:
    """The Rust codec pipeline in the place of zarr-python's own."""
    import zarrs  # noqa: F401

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield
