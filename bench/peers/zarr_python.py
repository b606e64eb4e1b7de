"""zarr-python 3, with its own codec pipeline or with that of zarrs."""

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


@contextmanager
def zarrs() -> Iterator[None]:
    """The Rust codec pipeline in the place of zarr-python's own."""
    import zarrs  # noqa: F401

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield
