"""Stores of every released format version, frozen byte for byte, are read for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.archives.make import COUNT, HERE, columns, trajectory
from trajstore.operations.verify import verify

VERSIONS = sorted(path for path in HERE.iterdir() if (path / "zarr.json").exists())


def test_there_is_an_archive():
    assert [path.name for path in VERSIONS] == ["1.0"]


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_it_reads_as_it_was_written(path: Path):
    ds = trajstore.open(path)
    numbers = [i for i in range(COUNT) if i != 5]
    assert ds.table["seed"].tolist() == [100 + i for i in numbers]
    for got, i in zip(ds, numbers):
        wanted = trajectory(i)
        wanted |= {"nested/x": wanted.pop("nested")["x"]}
        for name, rows in wanted.items():
            if isinstance(rows, np.ndarray):
                assert got[name].dtype == rows.dtype and got[name][:].tobytes() == rows.tobytes(), name
            else:
                assert got[name] == rows, name
        assert {name: got[name] for name in columns(i)} == columns(i)


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_it_is_whole_and_can_be_gone_on_with(path: Path, tmp_path: Path):
    assert verify(path).ok
    shutil.copytree(path, tmp_path / "run")
    with trajstore.create(tmp_path / "run", resume=True, config={"env": "archive"}) as writer:
        assert writer.state == {"counter": 7} and writer.target == COUNT and len(writer.attempted) == 2000 + COUNT // 2
        writer.append(trajectory(99), **columns(99))
    assert trajstore.open(tmp_path / "run")[-1]["task"] == "täsk 99"
