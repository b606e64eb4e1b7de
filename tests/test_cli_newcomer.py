"""What somebody who does not know the command line yet types: answered by what is wrong and the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.test_cli import cli
from trajstore.cli import formats


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("newcomer") / "run.zarr"
    with trajstore.create(path, unique="seed", handle_signals=False) as writer:
        for seed in range(4):
            steps = 5 + seed
            rows = {
                "observations": np.full((steps + 1, 4), seed, np.float32),
                "actions": np.full((steps, 2), seed, np.float32),
                "rewards": np.arange(steps, dtype=np.float64),
            }
            writer.append(rows, seed=seed, success=bool(seed % 2), level=f"maze {seed}")
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("newcomer") / "empty.zarr"
    trajstore.create(path, handle_signals=False).close()
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("robomimic", "x.hdf5"), ("d4rl", "x.hdf5"), ("hdf5", "x.h5"), ("hdf5", "x.hdf5")),
        *(("flat", "x.npz"), ("ogbench", "x.npz"), ("minari", "folder")),
    ],
)
def test_an_import_knows_a_file_by_what_it_holds(store: Path, tmp_path: Path, name: str, file: str) -> None:
    if file.endswith((".h5", ".hdf5", "folder")):
        pytest.importorskip("h5py")
    assert cli("export", store, tmp_path / file, "--to", name).exit_code == 0
    assert formats.recognise(str(tmp_path / file), "importer", "--from") == name
    done = cli("import", tmp_path / file, tmp_path / "new")
    assert done.exit_code == 0 and done.stdout.startswith(f"4 trajectories -> {tmp_path / 'new'} (")
    if name != "hdf5":
        assert "`trajstore import" in cli("info", tmp_path / file).stderr
    if name == "minari":
        assert formats.recognise(str(tmp_path / "folder/data/main_data.hdf5"), "importer", "--from") == "minari"


def test_an_import_that_cannot_tell_names_what_the_file_could_be(store: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", some=np.zeros(3))
    said = cli("import", tmp_path / "x.npz", tmp_path / "new")
    assert said.exit_code == 2 and "pass --from, one of routes, ogbench, flat\n" in said.stderr
    said = cli("import", store, tmp_path / "new")
    assert said.exit_code == 2 and "merge or compact" in said.stderr
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["some"] = np.zeros(3)
    said = cli("import", tmp_path / "x.hdf5", tmp_path / "new")
    assert said.exit_code == 2 and "pass --from, one of hdf5, minari, robomimic, d4rl\n" in said.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sum", "level"], "field 'level' is a string"),
        (["--sum", "seed"], "has no field 'seed'"),
        (["--returns-to-go", "level"], "field 'level' is a string"),
        (["--returns-to-go", "rewards", "--discount", "nan"], "a discount is a number from 0 to 1"),
        (["--returns-to-go", "rewards", "--discount", "-1"], "a discount is a number from 0 to 1"),
        (["--advantages", "rewards", "rewards", "--decay", "inf"], "a decay is a number from 0 to 1"),
        (["--advantages", "rewards", "observations"], "rows of 'observations' have the shape (4,), of 'rewards' ()"),
        (["--advantages", "rewards", "rewards", "--terminated", "observations"], "has 6 rows, and 'rewards' 5"),
        (["--value", "length", "--discount", "0.9"], "--discount is for --returns-to-go and --advantages"),
        (["--value", "length", "--decay", "0.9"], "--decay is for --advantages"),
        (["--sum", "rewards", "--terminated", "actions"], "--terminated is for --advantages"),
        (["--returns-to-go", "rewards", "--dtype", "int8"], "--dtype is for --value and --sum"),
        (["--returns-to-go", "rewards", "--default", "0"], "--default is for --value and --sum"),
    ],
)
def test_what_add_column_cannot_make(store: Path, words: list[str], said: str) -> None:
    before = trajstore.open(store).snapshots[0].manifest.commit.number
    result = cli("add-column", store, "new", *words)
    assert result.exit_code in (1, 2) and said in result.stderr and "Traceback" not in result.stderr
    assert trajstore.open(store).snapshots[0].manifest.commit.number == before


def test_a_sum_over_what_some_trajectories_lack(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        for rewards in (np.ones(3), None):
            writer.append({"x": np.zeros(3), "reward": rewards})
    assert cli("add-column", tmp_path / "s", "return", "--sum", "reward").exit_code == 0
    assert np.array_equal(trajstore.open(tmp_path / "s").table["return"], [3, np.nan], equal_nan=True)


def test_an_empty_name_is_no_path(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    monkeypatch.chdir(store)  # which an empty name stood for
    for command in (["info"], ["ls"], ["verify"], ["sample"], ["repair"], ["delete", "--ids", "1", "--dry-run"]):
        result = cli(*command[:1], "", *command[1:])
        assert result.exit_code == 1 and result.stderr.startswith("error: '' is no path"), command
    assert cli("export", "", "x.npz").exit_code == 1


def test_an_empty_store_has_no_field_and_says_so(empty: Path) -> None:
    result = cli("add-column", empty, "x", "--sum", "reward")
    assert result.stderr.splitlines() == [f"error: {empty} has no field 'reward'", "hint: it has none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "S", "--weights", "level"], "column 'level' holds texts"),
        (["sample", "S", "--windows", "99999999999999999999"], "a whole number, 1 to"),
        (["sample", "S", "--windows", "2", "--stride", "99999999999999999999"], "a whole number, 1 to"),
        (["sample", "S", "--fields", ""], "there is no field ''"),
        (["repair", "S", "--commit", "9"], "--commit is for a DESTINATION, or --dry-run"),
        (["export", "S", "out.npz", "--to", "flat", "--fields", ""], "there is no field ''"),
        (["import", "F", "new", "--from", "flat", "-o", "limit=-1"], "limit is -1"),
        (["import", "F", "new", "--from", "flat", "-o", "limit=x"], "limit is 'x'"),
        (["import", "F", "F", "new", "--from", "flat"], "the format flat takes one SOURCE, not 2"),
        (["export", "S", "out", "--to", "lerobot", "-o", "fps=-1"], "fps is a number above 0"),
        (["export", "S", "out", "--to", "lerobot", "-o", "fps=x"], "fps is a number above 0"),
        (["verify", "F"], "take it in with `trajstore import"),
    ],
)
def test_what_is_answered_by_the_way_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("export", store, "flat.npz", "--to", "flat").exit_code == 0
    result = cli(*[{"S": str(store), "F": "flat.npz"}.get(word, word) for word in words])
    assert result.exit_code in (1, 2) and said in result.stderr and "defect" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["flat.npz"]
