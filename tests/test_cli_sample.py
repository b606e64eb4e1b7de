"""``trajstore sample``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import trajstore

pytest.importorskip("click")

from click.testing import CliRunner, Result

from trajstore.cli import main


def cli(*words: object) -> Result:
    return CliRunner().invoke(main, ["sample", *map(str, words)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run.zarr"
    with trajstore.create(path, handle_signals=False) as writer:
        for number in range(10):
            writer.append({"obs": np.zeros((31, 4), np.float32), "action": np.arange(30)}, level=number)
    return path


def test_it_prints_keys_shapes_and_rates(store: Path) -> None:
    result = cli(store, "--windows", 16, "--stride", 2, "--batch", 8, "--batches", 3)
    assert result.exit_code == 0, result.output
    assert "obs     (8, 16, 4)  float32" in result.stdout and "action  (8, 16)     int64" in result.stdout
    assert "samples/s" in result.stdout


def test_json(store: Path) -> None:
    words = ["--windows", 4, "--before", 3, "--pad", "zero", "--where", "level < 4", "--fields", "action", "--json"]
    report = json.loads(cli(store, *words).stdout)
    assert report["trajectories"] == 4 and report["samples"] == 4 * 30
    assert report["batch"]["action"] == {"shape": [64, 4], "dtype": "int64"} and "mask" in report["batch"]
    assert report["samples_per_second"] > 0
    report = json.loads(cli(store, "--order", "blocks", "--weights", "level > 8", "--json").stdout)
    assert set(report["shuffle_quality"]) == {"batch_variance", "neighbours"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", 99], "no sample of this shape"),
        (["--fields", "obz"], "no field 'obz'"),
        (["--where", "level <"], "level <"),
        (["--windows", 2, "--before", 9], "padded by 0 to 1"),
    ],
)
def test_wrong_usage(store: Path, words: list[object], message: str) -> None:
    result = cli(store, *words)
    assert result.exit_code == 2 and message in result.stderr
