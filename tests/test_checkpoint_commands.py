"""What the command line calls: listing, pruning, comparing, exporting, archiving, plotting; of any folder."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trajstore.checkpoint import Checkpoints
from trajstore.checkpoint.archiving import archive_checkpoints
from trajstore.checkpoint.difference import diff_checkpoints
from trajstore.checkpoint.listing import (
    checkpoint_path,
    list_checkpoints,
    note,
    parse_best,
    parse_steps,
    pin,
    prune,
    verify,
)
from trajstore.checkpoint.plot import folder_figure, metrics_figure, plot_folder, series, training_figure
from trajstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    LockedError,
    NotFoundError,
    SchemaError,
    UnsupportedFormatError,
)


def fill(path, count=6, **kwargs):
    frozen = np.arange(100_000.0)
    with Checkpoints(path, **{"keep_last": None, **kwargs}) as ckpts:
        for step in range(count):
            state = {"model": {"w": np.full(100, step), "frozen": frozen}, "opt": {"lr": 0.1 * step, "m": np.ones(5)}}
            ckpts.save(
                step, state, {"reward_mean": float(step % 4), "episodes_completed": 10 * step}, final=step == count - 1
            )
    return path


def rllib(path, iterations=(10, 20, 30, 40)):
    path = Path(path)
    for i, iteration in enumerate(iterations):
        folder = path / f"checkpoint_{iteration:06d}"
        (folder / "policies").mkdir(parents=True)
        (folder / "algorithm_state.pkl").write_bytes(b"\x80\x04state%d" % iteration)
        (folder / "policies" / "p.pkl").write_bytes(b"p" * 1000)
        facts = {
            "iteration": iteration,
            "timestamp": f"2024-12-19T15:{i:02d}:00",
            "reward_mean": [1.0, 9.0, float("nan"), 3.0][i % 4],
        }
        (folder / "metadata.json").write_text(
            json.dumps(facts | {"episodes_completed": 30 * iteration} | ({"final": True} if i == 3 else {}))
        )
    entries = [{"iteration": i, "path": f"checkpoint_{i:06d}", "timestamp": "t"} for i in iterations]
    (path / "checkpoint_index.json").write_text(json.dumps({"checkpoints": entries, "last_updated": "t"}))
    (path / "metrics_iter_40.json").write_text(
        json.dumps([{"reward_mean": i / 2, "seeker_kl": 0.1 * i, "hider_kl": 0.2} for i in range(1, 41)])
    )
    return path


def navrl(path):
    torch, lz4 = pytest.importorskip("torch"), pytest.importorskip("lz4.frame")
    import io

    Path(path).mkdir()
    for i, name in enumerate(
        ["checkpoint_0.pt", "checkpoint_1000.pt.lz4", "checkpoint_2000.pt", "checkpoint_final.pt.lz4"]
    ):
        buffer = io.BytesIO()
        torch.save({"model_state_dict": {"w": torch.full((10_000,), float(i))}, "iteration": i}, buffer)
        data = buffer.getvalue()
        (Path(path) / name).write_bytes(lz4.compress(data) if name.endswith(".lz4") else data)
        os.utime(Path(path) / name, (1000 + i, 1000 + i))
    return path


def openrl(path):
    torch = pytest.importorskip("torch")
    for i, steps in enumerate((500_000, 9_000_000, 10_000_000)):
        folder = Path(path) / f"rl_model_{steps}_steps"
        folder.mkdir(parents=True)
        torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
        os.utime(folder / "module.pt", (1000 + i, 1000 + i))
        (Path(path) / f"rl_model_replay_buffer_{steps}_steps.pkl").write_bytes(b"buffer")
    return path


def test_a_listing_says_what_there_is_and_why_it_stays(tmp_path):
    fill(tmp_path / "c", keep_last=2, keep_best=("reward_mean", "max", 1))
    listing = list_checkpoints(tmp_path / "c")
    assert [(r.checkpoint.step, r.kept, r.best) for r in listing.rows] == [
        (3, ("best reward_mean",), True), (4, ("last",), False), (5, ("last",), False),
    ]  # fmt: skip
    assert listing.rows[-1].checkpoint.final and listing.latest == 5 and listing.episodes == 50
    real = sum(f.stat().st_size for f in (tmp_path / "c" / "step-000000000003").rglob("*") if f.is_file())
    assert listing.rows[0].disk_bytes == real
    assert listing.rows[1].disk_bytes < real / 2, "the frozen layer is one file with several names"
    (tmp_path / "c" / "step-000000000004" / "zarr.json").write_bytes(b"")
    assert list_checkpoints(tmp_path / "c").damaged == ("step-000000000004",)
    assert [name for name, _ in verify(tmp_path / "c")] == ["step-000000000004"] and verify(
        tmp_path / "c", "latest"
    ) == []


def test_paths_for_other_commands(tmp_path):
    fill(tmp_path / "c")
    assert checkpoint_path(tmp_path / "c") == str(tmp_path / "c" / "step-000000000005")
    assert checkpoint_path(tmp_path / "c", "best").endswith("3") and checkpoint_path(tmp_path / "c", 2).endswith("2")
    assert checkpoint_path(tmp_path / "c", "best", "reward_mean", "min").endswith("4"), "of equals the newer"
    for bad in (77, "nonsense"):
        with pytest.raises(NotFoundError, match="no checkpoint"):
            checkpoint_path(tmp_path / "c", bad)
    with pytest.raises(NotFoundError):
        checkpoint_path(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no checkpoint in"):
        checkpoint_path(tmp_path / "empty")


def test_a_metric_that_none_has_is_refused_naming_those_there_are(tmp_path):
    fill(tmp_path / "c")
    for command in (lambda: list_checkpoints(tmp_path / "c", ["reward_mean", "typo"]),
                    lambda: checkpoint_path(tmp_path / "c", "best", "typo"),
                    lambda: prune(tmp_path / "c", keep_best=("typo", "max", 1))):  # fmt: skip
        with pytest.raises(NotFoundError, match="has the metric 'typo'") as caught:
            command()
        assert caught.value.hint == "there are reward_mean, episodes_completed"
    assert len(list_checkpoints(tmp_path / "c", ["reward_mean"]).rows) == 6


def test_pins_and_notes_while_a_run_saves(tmp_path):
    with Checkpoints(fill(tmp_path / "c", 2), keep_last=1) as ckpts:
        assert pin(tmp_path / "c", 0).pinned
        assert note(tmp_path / "c", 0, "the good one ä").note == "the good one ä"
        ckpts.save(9, {})
        ckpts.wait()
        assert [(c.step, c.pinned, c.note) for c in ckpts.list()] == [(0, True, "the good one ä"), (9, False, "")]
        with pytest.raises(LockedError):
            prune(tmp_path / "c", keep_last=1)
    assert not pin(tmp_path / "c", 0, pinned=False).pinned


def test_prune(tmp_path):
    fill(tmp_path / "c", 12)
    plan = prune(tmp_path / "c", keep_last=2, keep_best=("reward_mean", "max", 1), keep_every=5, keep=[1], dry_run=True)
    assert [c.step for c in plan.removed] == [2, 3, 4, 6, 7, 8, 9] and len(list_checkpoints(tmp_path / "c").rows) == 12
    assert (
        prune(tmp_path / "c", keep_last=2, keep_best=("reward_mean", "max", 1), keep_every=5, keep=[1]).removed
        == plan.removed
    )
    assert [r.checkpoint.step for r in list_checkpoints(tmp_path / "c").rows] == [0, 1, 5, 10, 11]
    with pytest.raises(SchemaError, match="no rule"):
        prune(tmp_path / "c")
    with pytest.raises(NotFoundError, match=r"'reward'.*there are reward_mean"):
        prune(tmp_path / "c", keep_best=("reward", "max", 3))
    # The newest two rot: the newest that verifies stays, whatever the rules say.
    for step in (10, 11):
        chunk = tmp_path / f"c/step-{step:012d}/opt.float64/c.0"
        data = bytearray(chunk.read_bytes())
        data[-1] ^= 1
        chunk.unlink()
        chunk.write_bytes(data)
    assert prune(tmp_path / "c", keep=[0]).kept.keys() == {"step-000000000000", "step-000000000005"}
    (tmp_path / "c" / "step-000000000000" / "zarr.json").write_bytes(b"")
    assert prune(tmp_path / "c", keep_last=1, damaged=True).damaged == ("step-000000000000",)
    (tmp_path / "c/step-000000000005/opt.float64/c.0").write_bytes(b"")
    with pytest.raises(CorruptionError, match="verifies"):
        prune(tmp_path / "c", keep_last=1)


def test_steps_and_rules_as_people_write_them():
    assert parse_steps("25M, 50M,1.5k,500_000,7") == [25_000_000, 50_000_000, 1500, 500_000, 7]
    for bad in ("x", "1.2", "5Q", "-3"):
        with pytest.raises(SchemaError):
            parse_steps(bad)
    assert parse_best("r") == ("r", "max", 1) and parse_best("eval/loss:min:3") == ("eval/loss", "min", 3)
    with pytest.raises(SchemaError):
        parse_best("r:max:x")


def test_differences(tmp_path):
    fill(tmp_path / "c")
    found, equal = diff_checkpoints(tmp_path / "c", 1, "latest")
    by_path = {difference.path: difference for difference in found}
    assert by_path["model/w"].largest == 4.0 and by_path["model/w"].relative == pytest.approx(4.0)
    assert (by_path["opt/lr"].left, by_path["opt/lr"].right) == (0.1, 0.5)
    assert by_path["metrics/episodes_completed"].right == 50 and equal == 2 and "model/frozen" not in by_path
    assert diff_checkpoints(tmp_path / "c", 2, 2) == ([], 4)


def test_exports(tmp_path):
    torch = pytest.importorskip("torch")
    from trajstore.checkpoint.exporting import export_checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(7, {"model": model, "step": 7})
    export_checkpoint(tmp_path / "c", "latest", tmp_path / "out" / "all.pt")
    loaded = torch.load(tmp_path / "out" / "all.pt", weights_only=True)
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["0.weight"], model[0].weight)
    export_checkpoint(tmp_path / "c", 7, tmp_path / "model.safetensors", "model")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    with pytest.raises(AlreadyExistsError):
        export_checkpoint(tmp_path / "c", 7, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFormatError):
        export_checkpoint(tmp_path / "c", 7, tmp_path / "model.onnx")
    with pytest.raises(SchemaError, match="no tensors"):
        export_checkpoint(tmp_path / "c", 7, tmp_path / "b.safetensors", "step")


def test_the_usual_panels_know_the_reward_by_its_common_names():
    pytest.importorskip("matplotlib")
    for name in ("reward_mean", "episode_reward_mean"):
        axes = training_figure([{"iteration": i, name: i / 2} for i in range(4)]).axes[0]
        assert axes.lines[0].get_ydata().tolist() == [0, 0.5, 1, 1.5]


def test_archives(tmp_path):
    fill(tmp_path / "c", 4)
    made = archive_checkpoints(tmp_path / "c", [0, 1])
    assert made == [str(tmp_path / "c/archive" / f"step-{i:012d}.tar") for i in (0, 1)]
    assert [r.checkpoint.step for r in list_checkpoints(tmp_path / "c").rows] == [2, 3]
    with tarfile.open(made[1]) as archive:
        archive.extractall(tmp_path / "c", filter="data")
    assert [r.checkpoint.step for r in list_checkpoints(tmp_path / "c").rows] == [1, 2, 3] and verify(
        tmp_path / "c"
    ) == []
    with pytest.raises(SchemaError, match="newest"):
        archive_checkpoints(tmp_path / "c", ["latest"])
    archive_checkpoints(tmp_path / "c", ["latest"], tmp_path / "safe", remove=False)
    assert (tmp_path / "safe" / "step-000000000003.tar").exists() and len(list_checkpoints(tmp_path / "c").rows) == 3
    with pytest.raises(AlreadyExistsError):
        archive_checkpoints(tmp_path / "c", [3], tmp_path / "safe", remove=False)
    (tmp_path / "c/step-000000000002/opt.float64/c.0").write_bytes(b"rot")
    with pytest.raises(CorruptionError):
        archive_checkpoints(tmp_path / "c", [2])


def test_archives_of_a_folder_named_from_where_one_stands(tmp_path, monkeypatch):
    fill(tmp_path / "c", 2)
    monkeypatch.chdir(tmp_path)
    assert archive_checkpoints("c", [0]) == [str(tmp_path / "c/archive/step-000000000000.tar")]


# --- other programs' folders --------------------------------------------------------------------


def test_an_rllib_folder_in_place(tmp_path):
    rllib(tmp_path / "c")
    listing = list_checkpoints(tmp_path / "c")
    assert [(r.checkpoint.step, r.best, r.checkpoint.final) for r in listing.rows] == [
        (10, False, False), (20, True, False), (30, False, False), (40, False, True),
    ]  # fmt: skip
    assert listing.kind == "rllib" and listing.episodes == 1200 and listing.disk_bytes > 4000
    assert checkpoint_path(tmp_path / "c", "best") == str(tmp_path / "c" / "checkpoint_000020")
    pin(tmp_path / "c", 10)
    note(tmp_path / "c", 30, "odd")
    prune(tmp_path / "c", keep_last=1)
    assert sorted(p.name for p in (tmp_path / "c").glob("checkpoint_0*")) == ["checkpoint_000010", "checkpoint_000040"]
    index = json.loads((tmp_path / "c" / "checkpoint_index.json").read_text())
    assert [entry["iteration"] for entry in index["checkpoints"]] == [10, 40]
    assert verify(tmp_path / "c") == []
    (made,) = archive_checkpoints(tmp_path / "c", [10])
    with tarfile.open(made) as archive:
        assert archive.getnames()[0] == "checkpoint_000010/algorithm_state.pkl"
    with pytest.raises(UnsupportedFormatError, match="import"):
        diff_checkpoints(tmp_path / "c", 40, 40)


def test_a_navrl_folder_in_place(tmp_path):
    navrl(tmp_path / "c")
    rows = list_checkpoints(tmp_path / "c").rows
    assert [(r.checkpoint.name, r.checkpoint.step) for r in rows] == [
        ("checkpoint_0.pt", 0), ("checkpoint_1000.pt.lz4", 1000), ("checkpoint_2000.pt", 2000),
        ("checkpoint_final.pt.lz4", 2000),
    ]  # fmt: skip
    assert rows[-1].checkpoint.final and verify(tmp_path / "c") == []
    for name in ("checkpoint_2000.pt", "checkpoint_1000.pt.lz4"):
        file = tmp_path / "c" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x55
        status = file.stat()
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert {name for name, _ in verify(tmp_path / "c")} == {"checkpoint_1000.pt.lz4", "checkpoint_2000.pt"}
    prune(tmp_path / "c", keep_last=1)
    assert [p.name for p in (tmp_path / "c").glob("*.pt*")] == ["checkpoint_final.pt.lz4"]


def test_an_openrl_folder_in_place(tmp_path):
    openrl(tmp_path / "c")
    rows = list_checkpoints(tmp_path / "c").rows
    assert [r.checkpoint.step for r in rows] == [500_000, 9_000_000, 10_000_000]
    assert checkpoint_path(tmp_path / "c") == str(tmp_path / "c" / "rl_model_10000000_steps")
    prune(tmp_path / "c", keep_last=1, keep=parse_steps("0.5M"))
    left = sorted(p.name for p in (tmp_path / "c").iterdir() if p.name != "__trajstore")
    assert left == sorted(
        f"rl_model_{kind}{s}_steps{end}"
        for s in (500_000, 10_000_000)
        for kind, end in (("", ""), ("replay_buffer_", ".pkl"))
    )
    (tmp_path / "c/rl_model_10000000_steps/module.pt").write_bytes(b"PK torn")
    assert [name for name, _ in verify(tmp_path / "c")] == ["rl_model_10000000_steps"]


@pytest.mark.parametrize("kind", ["rllib", "navrl", "openrl"])
def test_other_folders_are_imported(tmp_path, kind):
    pytest.importorskip("torch")
    from trajstore.checkpoint.importing import import_checkpoints

    source = {"rllib": rllib, "navrl": navrl, "openrl": openrl}[kind](tmp_path / "old")
    names = [r.checkpoint.name for r in list_checkpoints(source).rows]
    done = import_checkpoints(source, tmp_path / "new")
    assert list(done.taken) == names and not done.failed
    again = import_checkpoints(source, tmp_path / "new")
    assert not again.taken and list(again.present) == names
    with Checkpoints(tmp_path / "new", read_only=True) as ckpts:
        assert ckpts.verify() == [] and [c.meta["imported"] for c in ckpts.list()] == names
        state = ckpts.restore().state
        if kind == "rllib":
            assert ckpts.list()[1].metrics["reward_mean"] == 9.0 and ckpts.latest().final
            assert state["files"]["algorithm_state.pkl"] == b"\x80\x04state40"
            assert ckpts.best("reward_mean").step == 20
        elif kind == "navrl":
            assert (state["model_state_dict"]["w"] == 3).all() and state["iteration"] == 3
        else:
            path = Path(source) / names[-1] / "module.pt"
            assert state["files"]["module.pt"] == path.read_bytes()
    with pytest.raises(SchemaError, match="already"):
        import_checkpoints(tmp_path / "new", tmp_path / "newer")


def test_stable_baselines3_files_are_imported(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    from trajstore.checkpoint.importing import import_checkpoints

    model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
    (tmp_path / "old").mkdir()
    model.save(tmp_path / "old" / "rl_model_100_steps.zip")
    assert import_checkpoints(tmp_path / "old", tmp_path / "new").taken == ("rl_model_100_steps.zip",)
    state = Checkpoints(tmp_path / "new", read_only=True).restore().state
    policy = model.policy.state_dict()
    assert all((state["policy"][key] == value).all() for key, value in policy.items()) and "data" in state["files"]


def test_a_damaged_file_is_not_imported(tmp_path):
    from trajstore.checkpoint.importing import import_checkpoints

    navrl(tmp_path / "old")
    (tmp_path / "old" / "checkpoint_2000.pt").write_bytes(b"PK torn")
    done = import_checkpoints(tmp_path / "old", tmp_path / "new")
    assert len(done.taken) == 3 and done.failed[0][0] == "checkpoint_2000.pt"


# --- plots --------------------------------------------------------------------------------------


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    fill(tmp_path / "c")
    rllib(tmp_path / "r")
    for source, metrics, name in [("c", (), "a.png"), ("c", ("reward_mean",), "b.svg"), ("r", (), "c.pdf"),
                                  ("r", ("seeker_kl", "hider_kl", "reward_mean"), "d.png")]:  # fmt: skip
        plot_folder(tmp_path / source, tmp_path / "out" / name, metrics)
        head = (tmp_path / "out" / name).read_bytes()[:200]
        assert {"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[-3:]] in head
    with pytest.raises(NotFoundError, match="there are episodes_completed, reward_mean"):
        plot_folder(tmp_path / "c", tmp_path / "x.png", ["loss"])
    with pytest.raises(UnsupportedFormatError):
        plot_folder(tmp_path / "c", tmp_path / "x.bmp")
    shutil.rmtree(tmp_path / "c")
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, {})
    with pytest.raises(NotFoundError):
        plot_folder(tmp_path / "c", tmp_path / "x.png", ["loss"])


def test_a_plot_shows_what_was_recorded():
    pytest.importorskip("matplotlib")

    def titles(*metrics):
        figure = folder_figure([{"step": step, **dict.fromkeys(metrics, 1.0)} for step in range(3)], "run")
        return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()], figure.get_suptitle()

    assert titles("loss", "reward_mean", "success") == (["loss", "reward_mean", "success"], "run")
    usual, _ = titles("loss", "reward_mean", "episode_len_mean", "kl")
    assert usual == ["Episode reward", "Reward by role", "Episode length", "KL divergence", "Entropy", "Latest"]
    many, title = titles(*(f"m{i}" for i in range(20)))
    assert many == [f"m{i}" for i in range(12)]
    assert title == "run: 12 of 20 metrics, --metric draws others"
    assert len(titles()[0]) == 6, "nothing to draw: the panels say so"


def test_a_line_goes_through_what_was_measured():
    history = [
        {"step": 10, "eval": {"r": 1.0}},
        {"step": 20, "eval": {"r": float("nan")}},
        {"step": 30, "eval": {"r": 3}},
    ]
    assert series(history, "eval/r") == ([10.0, 30.0], [1.0, 3.0])
    assert series([{"r": 1}, {"r": 2}], "r") == ([1.0, 2.0], [1.0, 2.0])
    pytest.importorskip("matplotlib")
    figure = metrics_figure(history, ["eval/r"])
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [10.0, 30.0]
    assert figure.axes[0].get_xlabel() == "step"
    figure = metrics_figure([{"step": 10, "iteration": 1, "r": 2.0}], ["r"])
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [1.0]
    assert figure.axes[0].get_xlabel() == "iteration"
