"""docs/spec.md is enough: its two readers, run as they stand there, read a store of every kind of field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.format import layout, manifest, schema

SPEC = (Path(__file__).parent.parent / "docs" / "spec.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", SPEC, re.S)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sessions, packed frames, a misfit, T + 1 observations, an absent field, gaps."""
    path = tmp_path_factory.mktemp("spec") / "run.zarr"
    rng = np.random.default_rng(0)
    expected = []
    for session in range(3):
        with trajstore.create(path, resume=True) as writer:
            for i in range(300):
                n = int(rng.integers(1, 30))
                trajectory = {
                    "frames": (rng.integers(0, 256, (n, 3, 8, 8)) / 255).astype(np.float16),
                    "obs": rng.standard_normal((n + 1, 5)),
                    "action": rng.integers(0, 9, n),
                    "goal": None if i % 7 == 3 else rng.standard_normal((n, 2)).astype(np.float32),
                    "task": f"pick {i}",
                }
                writer.append(trajectory, seed=300 * session + i)
                expected.append(trajectory)
                if i % 100 == 50:
                    writer.commit()
    return path, expected


def namespace(block):
    found = {}
    exec(block, found)
    return found


def test_the_reader_on_zarr_python(store):
    pytest.importorskip("zarr")
    path, expected = store
    read = namespace(BLOCKS[0])["read"]
    for field in ("frames", "obs", "action", "goal"):
        got = list(read(path, field))
        assert len(got) == len(expected)
        for rows, trajectory in zip(got, expected):
            assert_same(rows, trajectory[field])


def test_the_reader_on_numpy(store):
    path, expected = store
    trajectory = namespace(BLOCKS[1])["trajectory"]
    rows = trajstore.open(path).snapshots[0].live
    for i in [*range(0, 900, 37), 299, 300, 600, 899]:
        for field in ("frames", "obs", "action", "goal"):
            assert_same(trajectory(path, rows.nth(i), field), expected[i][field])
        assert trajectory(path, rows.nth(i), "task").tobytes().decode() == expected[i]["task"]


def assert_same(got, expected):
    if expected is None:
        assert got is None
    else:
        assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


def test_the_readers_stay_short():
    assert all(len(block.splitlines()) <= 45 for block in BLOCKS)


def test_names_come_from_the_code():
    for name in (layout.STEPS, layout.CLOCKS, layout.TABLE, layout.SEALS, layout.SETS, layout.PRIVATE, layout.COMMITS):
        assert f"{name}/" in SPEC, name
    for name in (*schema.RELATIONS, *manifest.KNOWN_FEATURES, *manifest.SET_NAMES):
        assert f"`{name}`" in SPEC or f"`{name}:" in SPEC or f"`{name}`:" in SPEC, name
    assert f"version {manifest.MAJOR}.{manifest.MINOR}" in SPEC


def test_every_key_of_the_manifest_is_told(store):
    path, _ = store
    body = json.loads((path / "zarr.json").read_text())["attributes"]["trajstore"]
    for key in [*body, *body["format"], *body["commit"], *body["counts"], *body["config"], *body["progress"]]:
        assert f"`{key}`" in SPEC, key
    for key in next(iter(body["schema"]["fields"].values())):
        assert f"`{key}`" in SPEC, key
