"""RLinf's buffer folders: into a store and back, merged and split, read without running what they say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from trajstore.compat.rlinf.__main__ import main  # noqa: E402
from trajstore.errors import AlreadyExistsError, FormatError, NotFoundError, SchemaError  # noqa: E402
from trajstore.exporters.rlinf import export_rlinf  # noqa: E402
from trajstore.importers.rlinf import import_rlinf  # noqa: E402
from trajstore.media.storage import LocalStorage  # noqa: E402
from trajstore.operations.merge import merge  # noqa: E402
from trajstore.operations.verify import verify  # noqa: E402
from trajstore.rlinf import load_batch, merge_folders, save_batch, split_folder  # noqa: E402
from trajstore.rlinf.folder import INDEXES  # noqa: E402

RANKS = Path(__file__).parent / "data" / "rlinf_ranks"
#: As the original tool merges them, but for the order of ranks, which is that of their numbers: rank and id of each.
MERGED = [(0, 0), (1, 0), (2, 0), (10, 0), (0, 1), (2, 2)]
WEIGHTS = "00000000-0000-0000-1234-567812345678"


def batch_file(folder: Path, number: int) -> dict[str, Any]:
    (path,) = folder.glob(f"trajectory_{number}_*")
    if path.suffix == ".pt":
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded
    with path.open("rb") as file:
        pickled: dict[str, Any] = pickle.load(file)
        return pickled


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        elif isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            assert found[name].contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8)), name
        else:
            assert found[name] == value


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    shutil.copytree(RANKS, tmp_path / "ranks")
    return tmp_path / "ranks"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rlinf") / "store"
    import_rlinf(RANKS, path, handle_signals=False)
    return path


# -- into a store and back ---------------------------------------------------------------------------------------------


def test_each_environment_is_a_trajectory(store: Path) -> None:
    dataset = trajstore.open(store)
    assert dataset.table["env"].tolist() == [0, 1] * 6
    assert list(zip(dataset.table["rank"][::2].tolist(), dataset.table["trajectory_id"][::2].tolist())) == MERGED
    for batch, (rank, number) in enumerate(MERGED):
        expected = batch_file(RANKS / f"rank_{rank}", number)
        for env in range(2):
            trajectory = dataset[2 * batch + env]
            assert len(trajectory) == 6
            image = expected["curr_obs"]["main_images"][:, env].numpy()
            np.testing.assert_array_equal(trajectory["curr_obs"]["main_images"][:], image)
            np.testing.assert_array_equal(trajectory["dones"][:], expected["dones"][:, env].numpy())
            np.testing.assert_array_equal(
                trajectory["prev_logprobs"][:], expected["prev_logprobs"][:, env].float().numpy()
            )
    assert dataset.schema.clocks["epochs"].relation == "first_row_of_each_epoch_extra"
    assert verify(store, deep=True).ok


def test_a_row_of_a_batch_is_a_step_of_an_environment(store: Path) -> None:
    """Row t · B + b, as their buffer counts the samples of a batch."""
    dataset = trajstore.open(store)
    flat = batch_file(RANKS / "rank_2", 2)["actions"].reshape(12, -1).numpy()
    rows = np.arange(12)
    np.testing.assert_array_equal(dataset.take("actions", 10 + rows % 2, rows // 2), flat)


@pytest.mark.parametrize("kind", ["pt", "pkl"])
def test_ranks_come_back_as_they_were(store: Path, tmp_path: Path, kind: str) -> None:
    assert export_rlinf(trajstore.open(store), tmp_path / "out", by_rank=True, format=kind).batches == 6
    assert sorted(os.listdir(tmp_path / "out")) == ["rank_0", "rank_1", "rank_10", "rank_2"]
    for rank, number in MERGED:
        folder = tmp_path / "out" / f"rank_{rank}"
        assert_same(batch_file(folder, number), batch_file(RANKS / f"rank_{rank}", number))
        assert (folder / f"trajectory_{number}_{WEIGHTS}.{kind}").exists()
    for rank in (0, 1, 2, 10):
        folder, before = tmp_path / "out" / f"rank_{rank}", RANKS / f"rank_{rank}"
        index = next(read(before / name) for name in INDEXES if (before / name).exists())
        assert [read(folder / name) for name in INDEXES] == [index, index]
        assert read(folder / "metadata.json") == {**read(before / "metadata.json"), "trajectory_format": kind}
    again = import_rlinf(tmp_path / "out", tmp_path / "again", handle_signals=False)
    assert again.batches == 6 and again.samples == 72 and not again.missing


def test_an_export_is_what_a_merge_of_the_folders_is(store: Path, tmp_path: Path) -> None:
    export_rlinf(trajstore.open(store), tmp_path / "out", seed=7)
    merge_folders(str(RANKS), tmp_path / "merged", copy=True)
    for number, (rank, old) in enumerate(MERGED):
        expected = batch_file(RANKS / f"rank_{rank}", old)
        assert_same(batch_file(tmp_path / "out", number), expected)
        assert_same(batch_file(tmp_path / "merged", number), expected)
    for name in INDEXES:
        assert read(tmp_path / "out" / name) == read(tmp_path / "merged" / name)
    assert read(tmp_path / "out" / "metadata.json") == {**read(tmp_path / "merged" / "metadata.json"), "seed": 7}


def test_stores_of_ranks_merge_as_their_folders_do(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 10):
        import_rlinf(RANKS / f"rank_{rank}", tmp_path / "stores" / f"rank_{rank}", handle_signals=False)
    merged = merge(tmp_path / "stores", tmp_path / "all", order="trajectory_id")
    assert list(zip(merged.table["rank"][::2].tolist(), merged.table["trajectory_id"][::2].tolist())) == MERGED
    export_rlinf(merged, tmp_path / "out")
    for number, (rank, old) in enumerate(MERGED):
        assert_same(batch_file(tmp_path / "out", number), batch_file(RANKS / f"rank_{rank}", old))


def test_fields_that_only_some_batches_have_and_numbers_of_environments(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "rank_3")
    storage.make_root()
    batches = {
        0: {"rewards": torch.zeros(4, 1, 2), "note": "first", "max_episode_length": 9},
        5: {"rewards": torch.ones(4, 3, 2), "dones": torch.ones(6, 3, 1, dtype=torch.bool), "versions": None},
        7: {"rewards": torch.ones(2, 2, 2), "actions": torch.zeros(2, 2, 1, dtype=torch.bfloat16).fill_(float("nan"))},
    }
    for number, value in batches.items():
        save_batch(storage, f"trajectory_{number}_{'abc' if number else 'f00_12'}.pt", value)
    index = {str(number): {"num_samples": 0, "custom": number} for number in batches}
    (tmp_path / "rank_3" / INDEXES[1]).write_text(
        json.dumps({"trajectory_index": index, "trajectory_id_list": [0, 5, 7, 8]})
    )
    (tmp_path / "rank_3" / "metadata.json").write_text(json.dumps({"trajectory_format": "pt", "extra": 1}))
    report = import_rlinf(tmp_path / "rank_3", tmp_path / "store", handle_signals=False)
    assert report.trajectories == 6 and list(report.missing.values()) == [[8]] and "not there (1): 8" in str(report)
    dataset = trajstore.open(tmp_path / "store")
    assert dataset[0]["dones"] is None and len(dataset[1]["dones"]) == 6
    export_rlinf(dataset, tmp_path / "out", by_rank=True)
    for number, value in batches.items():
        expected = {name: item for name, item in value.items() if item is not None}
        assert_same(batch_file(tmp_path / "out" / "rank_3", number), expected)
    names = sorted(name for name in os.listdir(tmp_path / "out" / "rank_3") if name.endswith(".pt"))
    assert names == ["trajectory_0_f00_12.pt", "trajectory_5_abc.pt", "trajectory_7_abc.pt"]
    found = read(tmp_path / "out" / "rank_3" / INDEXES[0])["trajectory_index"]
    assert found["5"]["custom"] == 5 and found["5"]["num_samples"] == 12
    assert read(tmp_path / "out" / "rank_3" / "metadata.json")["extra"] == 1


def test_any_store_can_be_exported(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        writer.append({"rewards": np.arange(3.0), "curr_obs": {"state": np.ones((3, 2), np.float32)}})
    assert export_rlinf(trajstore.open(tmp_path / "s"), tmp_path / "out").batches == 1
    value = batch_file(tmp_path / "out", 0)
    assert value["rewards"].tolist() == [[0.0], [1.0], [2.0]] and value["curr_obs"]["state"].shape == (3, 1, 2)
    with pytest.raises(SchemaError, match="have no rank"):
        export_rlinf(trajstore.open(tmp_path / "s"), tmp_path / "other", by_rank=True)
    with pytest.raises(AlreadyExistsError):
        export_rlinf(trajstore.open(tmp_path / "s"), tmp_path / "out")


# -- what is refused ---------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/trajstore-was-here",)


@pytest.mark.parametrize("name", ["a.pkl", "a.pt"])
@pytest.mark.parametrize("evil", [Evil(), {"rewards": Evil()}])
def test_nothing_is_run(tmp_path: Path, name: str, evil: Any) -> None:
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, tmp_path / name)
    with pytest.raises(FormatError, match=name):
        load_batch(LocalStorage(tmp_path), name)
    assert not os.path.exists("/tmp/trajstore-was-here")


def test_damaged_files_are_named_or_skipped(ranks: Path, tmp_path: Path) -> None:
    (path,) = (ranks / "rank_1").glob("trajectory_0_*")
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(FormatError, match=r"trajectory_0_.*cannot be read"):
        import_rlinf(ranks, tmp_path / "store", handle_signals=False)
    report = import_rlinf(ranks, tmp_path / "store", unreadable="skip", handle_signals=False)
    assert report.batches == 5 and report.unreadable[0][0] == str(path)
    (ranks / "rank_2" / "metadata.json").write_text("{")
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        import_rlinf(ranks, tmp_path / "other", handle_signals=False)
    with pytest.raises(NotFoundError, match=r"has no metadata\.json"):
        import_rlinf(tmp_path, tmp_path / "other", handle_signals=False)


# -- merging and splitting folders -------------------------------------------------------------------------------------


def test_a_merge_moves_and_a_split_takes_the_first(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--source-path", str(ranks), "--save-path", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out == f"moved 6 trajectories, 72 samples to {tmp_path / 'all'}\n"
    assert os.listdir(ranks) == []
    assert sorted(os.listdir(tmp_path / "all")) == sorted(
        ["metadata.json", *INDEXES, *(f"trajectory_{number}_{WEIGHTS}.pt" for number in range(6))]
    )
    index = read(tmp_path / "all" / INDEXES[0])
    assert index["trajectory_id_list"] == list(range(6))
    assert [index["trajectory_index"][str(n)]["trajectory_id"] for n in range(6)] == list(range(6))
    assert read(tmp_path / "all" / "metadata.json") == {
        "trajectory_format": "pt", "size": 6, "total_samples": 72, "trajectory_counter": 6, "seed": 1234,
    }  # fmt: skip
    words = ["--source-path", str(tmp_path / "all"), "--save-path", str(tmp_path / "two"), "--split-count", "2"]
    assert main(words) == 0
    for number, (rank, old) in enumerate(MERGED):
        folder = tmp_path / ("two" if number < 2 else "all")
        assert_same(batch_file(folder, number), batch_file(RANKS / f"rank_{rank}", old))
    assert read(tmp_path / "all" / INDEXES[1])["trajectory_id_list"] == [2, 3, 4, 5], "the index names what is left"
    assert read(tmp_path / "all" / "metadata.json")["size"] == 4
    assert main(words) == 1 and "exists" in capsys.readouterr().err
    copy = ["split", *words, "--copy"]
    copy[4] = str(tmp_path / "three")
    assert main(copy) == 0 and len(list((tmp_path / "all").glob("*.pt"))) == 4
    with pytest.raises(SystemExit):
        main(["split", "--save-path", "x"])
    assert main(["split", *words[:2], "--save-path", str(tmp_path / "x"), "--split-count", "9"]) == 1


def test_missing_files_are_reported_and_left_out(
    ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.remove(next((ranks / "rank_0").glob("trajectory_1_*")))
    assert main(["--source-path", str(ranks), "--save-path", str(tmp_path / "all"), "--copy"]) == 0
    assert f"{ranks / 'rank_0'} names files that are not there, left out: 1" in capsys.readouterr().err
    assert read(tmp_path / "all" / "metadata.json")["size"] == 5
    assert len(list(ranks.rglob("*.pt"))) == 5, "copied"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("action", ["merge", "split"])
def test_a_move_that_is_killed_anywhere_goes_on(tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1 << 30]

    def limited(method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return method(*args, **options)

        return call

    for name in ("make_folder", "write", "rename", "link_from", "copy_from", "remove", "sync_folder"):
        monkeypatch.setattr(LocalStorage, name, limited(getattr(LocalStorage, name)))

    def run(root: Path) -> None:
        if action == "merge":
            merge_folders(str(root / "ranks"), root / "out")
        else:
            split_folder(str(root / "ranks" / "rank_0"), root / "out", 1)

    def tree(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    shutil.copytree(RANKS, tmp_path / "whole" / "ranks")
    run(tmp_path / "whole")
    changes, expected = (1 << 30) - left[0], tree(tmp_path / "whole")
    for moment in range(0, changes, max(changes // 15, 1)):
        root = tmp_path / str(moment)
        left[0] = 1 << 30
        shutil.copytree(RANKS, root / "ranks")
        left[0] = moment
        with pytest.raises(Killed):
            run(root)
        left[0] = 1 << 30
        try:
            run(root)
        except (AlreadyExistsError, NotFoundError):
            pass  # it had done all but tidy up after itself
        assert tree(root) == expected
        shutil.rmtree(root)
