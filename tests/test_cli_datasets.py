"""The commands on whole datasets: plans first, what is printed where, and what is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import trajstore

pytest.importorskip("click")

from click.testing import CliRunner, Result

from trajstore.cli import main


def cli(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for rank in (2, 10):
        with trajstore.create(tmp_path / "runs", part=f"rank_{rank}", handle_signals=False) as writer:
            for number in range(6):
                reward = np.arange(1.0 + number % 3)
                writer.append({"x": reward * 2, "reward": reward}, seed=100 * rank + number, good=number % 2 == 0)
    return tmp_path / "runs"


def test_merge_shows_its_plan_then_its_result(runs: Path, tmp_path: Path) -> None:
    done = cli("merge", runs, tmp_path / "all", "--order", "interleave")
    assert done.exit_code == 0 and done.stdout == f"12 trajectories -> {tmp_path / 'all'}\n"
    assert "12 trajectories, 24 steps from 2 stores" in done.stderr
    assert trajstore.open(tmp_path / "all").table["seed"][:4].tolist() == [200, 1000, 201, 1001]
    assert cli("merge", runs, tmp_path / "all").exit_code == 1


def test_a_dry_run_writes_nothing(runs: Path, tmp_path: Path) -> None:
    done = cli("merge", runs, tmp_path / "all", "--dry-run", "--where", "good")
    assert done.exit_code == 0 and "6 trajectories" in done.stdout and "reward" in done.stdout
    plan = json.loads(cli("merge", runs, tmp_path / "all", "--dry-run", "--json").stdout)
    assert plan["trajectories"] == 12 and set(plan["fields"]) == {"x", "reward"}
    split = json.loads(cli("split", runs, tmp_path / "parts", "--parts", "5", "--dry-run", "--json").stdout)
    assert [part["trajectories"] for part in split.values()] == [3, 3, 2, 2, 2]
    compact = cli("compact", runs, tmp_path / "cold", "--dry-run")
    assert compact.exit_code == 0 and "encoded anew" in compact.stdout
    assert json.loads(cli("delete", runs, "--where", "good", "--dry-run", "--json").stdout)["deleted"] == 6
    assert os.listdir(tmp_path) == ["runs"] and len(trajstore.open(runs)) == 12


def test_split_delete_undelete_compact_add_column(runs: Path, tmp_path: Path) -> None:
    store = tmp_path / "all"
    assert cli("merge", runs, store, "--fill", "unused=1").exit_code == 1
    assert cli("merge", runs, store).exit_code == 0
    done = cli("split", store, tmp_path / "parts", "--fractions", "train=0.75,test=0.25", "--seed", "1")
    assert done.stdout == f"9 trajectories -> {tmp_path}/parts/train\n3 trajectories -> {tmp_path}/parts/test\n"
    assert cli("delete", store, "--ids", "0,3-5").stdout == "4 trajectories deleted\n"
    assert json.loads(cli("undelete", store, "--ids", "3", "--json").stdout) == {"undeleted": 1}
    assert cli("compact", store, tmp_path / "cold", "--codec", "fast").exit_code == 0
    cold = tmp_path / "cold"
    assert trajstore.open(cold).table["id"].tolist() == [1, 2, 3, *range(6, 12)]
    assert cli("add-column", cold, "short", "--value", "length < 2").exit_code == 0
    assert cli("add-column", cold, "total", "--sum", "reward", "--default", "nan").exit_code == 0
    assert cli("add-column", cold, "togo", "--returns-to-go", "reward").stdout == f"added the field togo to {cold}\n"
    dataset = trajstore.open(cold)
    assert dataset.table["total"].tolist() == [float(t["togo"][0]) for t in dataset]
    assert dataset.table["short"].tolist() == (dataset.lengths < 2).tolist()


def test_a_move_asks_first(runs: Path, tmp_path: Path) -> None:
    refused = cli("merge", runs, tmp_path / "all", "--move")
    assert refused.exit_code == 2 and "--yes" in refused.stderr and len(os.listdir(runs)) == 3
    assert cli("merge", runs, tmp_path / "all", "--move", "--yes").exit_code == 0
    assert len(trajstore.open(tmp_path / "all")) == 12
    assert os.listdir(runs) == ["zarr.json"]


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["merge", "S", "D", "--fill", "x"],
            ["merge", "S", "D", "--codec", "small"],
            ["merge", "S", "D", "--keep", "last"],
            ["merge", "S", "D", "--seed", "1"],
            ["split", "S", "D", "--codec", "small"],
        ),
        *(["split", "S", "D", "--fractions", "a"], ["delete", "S"], ["delete", "S", "--ids", "a"], ["undelete", "S"]),
        *(["add-column", "S", "x"], ["add-column", "S", "x", "--value", "1", "--sum", "y"]),
        ["add-column", "S", "x", "--value", "seed", "--default", "no"],
    ],
    ids=" ".join,
)
def test_wrong_usage(runs: Path, tmp_path: Path, words: list[str]) -> None:
    places = {"S": str(runs / "rank_2"), "D": str(tmp_path / "new")}
    assert cli(*(places.get(word, word) for word in words)).exit_code == 2


def test_import_and_export_of_a_replay_buffer(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ranks = Path(__file__).parent / "data" / "rlinf_ranks"
    done = cli("import", ranks, tmp_path / "store")
    assert done.exit_code == 0 and done.stdout.startswith("6 batches, 12 trajectories, 72 steps")
    assert cli("export", tmp_path / "store", tmp_path / "out", "--to", "rlinf", "-o", "by_rank=true").exit_code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["rank_0", "rank_1", "rank_10", "rank_2"]


def test_what_is_mistyped_chooses_nothing(runs: Path, tmp_path: Path) -> None:
    store = runs / "rank_2"
    for ids in ("5-3", "3-", "0-1000000000000000000", "-1", "x"):
        for command in ("delete", "undelete"):
            assert cli(command, store, "--ids", ids).exit_code == 2
    assert len(trajstore.open(store)) == 6
    twice = cli("split", store, tmp_path / "parts", "--fractions", "a=0.9,a=0.1")
    assert twice.exit_code == 2 and "names 'a' twice" in twice.stderr
    for words in (
        ("split", store, tmp_path / "p", "--parts", 2),
        ("merge", runs, tmp_path / "m", "--order", "shuffle"),
    ):
        refused = cli(*words, "--seed", -1)
        assert refused.exit_code == 1 and "error: the seed of an order is -1" in refused.stderr


def test_a_store_without_a_trajectory_is_merged_compacted_and_repaired(tmp_path: Path) -> None:
    trajstore.create(tmp_path / "none").close()
    for command in ("merge", "compact", "repair"):
        done = cli(command, tmp_path / "none", tmp_path / command)
        assert done.exit_code == 0, done.stderr
        assert len(trajstore.open(tmp_path / command)) == 0
        assert cli("verify", tmp_path / command).exit_code == 0
        with trajstore.create(tmp_path / command, resume=True) as writer:
            writer.append({"x": [1.0]}, seed=3)
        assert trajstore.open(tmp_path / command).table["id"].tolist() == [0]


def test_an_option_that_a_format_cannot_do_without_is_named(runs: Path, tmp_path: Path) -> None:
    refused = cli("export", runs, tmp_path / "out", "--to", "lerobot")
    assert refused.exit_code == 2 and "the format lerobot needs the option 'fps': -o fps=" in refused.stderr
    assert not (tmp_path / "out").exists()
