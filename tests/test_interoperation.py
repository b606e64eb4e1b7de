"""Random schemas, written here and read by whatever Zarr libraries are installed; CI has zarr 3.1 and the newest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.campaign import share
from tests.campaign.workload import room

zarr = pytest.importorskip("zarr")
SCHEMAS = 150  # in each job that has zarr-python

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]


def random_trajectories(draw: np.random.Generator) -> list[dict[str, Any]]:
    """A few trajectories of one random schema: any dtype, any row shape, rows of two clocks."""
    fields = {}
    for number in range(draw.integers(1, 6)):
        name = "/".join(["a", "b", f"f{number}"][draw.integers(0, 3) :])
        shape = tuple(int(n) for n in draw.integers(1, 5, draw.integers(0, 4)))
        fields[name] = str(draw.choice(DTYPES)), shape, bool(draw.integers(0, 2))
    found = []
    for _ in range(draw.integers(1, 30)):
        steps = int(draw.integers(1, 40))
        trajectory: dict[str, Any] = {"always": np.arange(steps)}
        for path, (dtype, shape, extra) in fields.items():
            raw = draw.integers(0, 256, (steps + extra, *shape, np.dtype(dtype).itemsize), np.uint8)
            if dtype == "bool":
                raw &= 1
            values = np.ascontiguousarray(raw).view(dtype).reshape(steps + extra, *shape)
            inside = trajectory
            *parents, name = path.split("/")
            for parent in parents:
                inside = inside.setdefault(parent, {})
            inside[name] = np.nan_to_num(values) if np.dtype(dtype).kind in "fc" else values
        found.append(trajectory)
    return found


def flat(trajectory: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in trajectory.items():
        values |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return values


@pytest.fixture(scope="module", params=share.mine(range(3 * SCHEMAS)))
def written(request: pytest.FixtureRequest) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    draw = np.random.default_rng(request.param)
    with room() as folder:
        yield write(draw, folder / "store")


def write(draw: np.random.Generator, place: Path) -> tuple[Path, list[dict[str, Any]]]:
    trajectories = random_trajectories(draw)
    half = len(trajectories) // 2
    for part in (trajectories[:half], trajectories[half:]):  # two sessions, so that there is a gap
        with trajstore.create(place, resume=True, commit_every=None) as writer:
            for number, trajectory in enumerate(part):
                writer.append(trajectory, number=number)
    return place, [flat(trajectory) for trajectory in trajectories]


def expected(trajectories: list[dict[str, Any]], path: str) -> np.ndarray[Any, Any]:
    return np.concatenate([trajectory[path] for trajectory in trajectories])


def named(root: Any, path: str, values: Any) -> np.ndarray[Any, Any]:
    """The rows that trajectories name, as a plain reader finds them."""
    body = root.attrs["trajstore"]
    field = body["schema"]["fields"][path]
    rows = [row for start, stop in body["sets"]["rows"] for row in range(start, stop)]
    pairs = root[f"clocks/{field['clock']}"][:][rows]
    whole = values(field["array"])
    stored = np.concatenate([np.asarray(whole[start:stop]) for start, stop in pairs.tolist()])
    rule = field["rule"]
    if rule["kind"] == "divide":
        return (stored / rule["divisor"]).astype(field["dtype"])
    return stored


def test_our_own_reader(written: tuple[Path, list[dict[str, Any]]]) -> None:
    place, trajectories = written
    dataset = trajstore.open(place)
    for path in trajectories[0]:
        assert dataset.read(path).tobytes() == expected(trajectories, path).tobytes(), path


def test_zarr_python(written: tuple[Path, list[dict[str, Any]]]) -> None:
    place, trajectories = written
    share.count("interoperation", {"schemas": 1})
    root = zarr.open_group(place, mode="r")
    for path in trajectories[0]:
        found = named(root, path, lambda array: root[array])
        assert found.dtype == trajectories[0][path].dtype
        assert found.tobytes() == expected(trajectories, path).tobytes(), path


def test_zarrs(written: tuple[Path, list[dict[str, Any]]]) -> None:
    pytest.importorskip("zarrs")
    place, trajectories = written
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        root = zarr.open_group(place, mode="r")
        for path in trajectories[0]:
            found = named(root, path, lambda array: root[array][:])
            assert found.tobytes() == expected(trajectories, path).tobytes(), path


def test_tensorstore(written: tuple[Path, list[dict[str, Any]]]) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    place, trajectories = written
    root = zarr.open_group(place, mode="r")

    def values(array: str) -> Any:
        kvstore = {"driver": "file", "path": str(place / array)}
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result().read().result()

    for path in trajectories[0]:
        assert named(root, path, values).tobytes() == expected(trajectories, path).tobytes(), path


def test_dask(written: tuple[Path, list[dict[str, Any]]]) -> None:
    if importlib.util.find_spec("dask") is None:
        pytest.skip("dask is not installed")
    import dask.array

    place, trajectories = written
    root = zarr.open_group(place, mode="r")
    for path in trajectories[0]:
        found = named(
            root, path, lambda array: dask.array.from_array(root[array], chunks="auto").compute(scheduler="sync")
        )
        assert found.tobytes() == expected(trajectories, path).tobytes(), path
