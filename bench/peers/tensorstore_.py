"""TensorStore on local files: a thread of copies and decoding for each core, 16 of files, nothing held in its cache.

Its documentation advises to raise ``file_io_concurrency`` where reads are small; beyond 16 nothing changed here, nor
with batches (``ts.Batch``), nor with one index for all windows, which was slower.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from trajstore.format.layout import Codec


def context(cache: int = 0) -> Any:
    return ts.Context(
        {
            "data_copy_concurrency": {"limit": os.cpu_count()},
            "file_io_concurrency": {"limit": 16},
            "cache_pool": {"total_bytes_limit": cache},
        }
    )


def opened(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return ts.open(spec, open=True, read=True, context=context()).result()


def create(path: Path, rows: np.ndarray[Any, Any], *, chunk: int, codec: Codec) -> None:
    """One array, one file a chunk: the chunking at which its random reads are fastest."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": list(rows.shape),
            "data_type": rows.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk, *rows.shape[1:]]}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {
                    "name": "blosc",
                    "configuration": {
                        "cname": codec.cname,
                        "clevel": codec.clevel,
                        "shuffle": codec.shuffle,
                        "typesize": rows.dtype.itemsize,
                        "blocksize": 0,
                    },
                },
            ],
        },
    }
    array = ts.open(spec, create=True, delete_existing=True, context=context()).result()
    array.write(rows).result()
