"""``trajstore ckpt`` and ``trajstore runs`` as a person at a terminal meets them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

click = pytest.importorskip("click")

from click.testing import CliRunner  # noqa: E402

from trajstore.checkpoint import Checkpoints  # noqa: E402
from trajstore.cli.checkpoint import checkpoint_group, runs_group  # noqa: E402
from trajstore.errors import NotFoundError  # noqa: E402
from trajstore.run import run_dir  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        for step in range(5):
            metrics = {"reward_mean": [1.0, 5.0, float("nan"), 2.0, 3.0][step], "episodes_completed": 100 * step}
            ckpts.save(
                1_000_000 * step, {"model": {"w": np.full(50, step)}, "lr": 0.1 / (step + 1)}, metrics, final=step == 4
            )
    return str(tmp_path / "c")


def run(*words, group=checkpoint_group, input=None):
    result = CliRunner().invoke(group, [str(word) for word in words], input=input, standalone_mode=False)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_ls(folder):
    out = run("ls", folder).stdout
    lines = out.splitlines()
    assert lines[0].split() == ["step", "date", "reward_mean", "episodes_completed", "size", "kept", "because"]
    assert "[BEST]" in lines[2] and "[FINAL]" in lines[5] and "nan" in lines[3]
    assert "latest       4000000" in out and "episodes     400" in out
    run("pin", folder, 1_000_000)
    run("note", folder, 1_000_000, "opens the door")
    detailed = run("ls", folder, "--detailed").stdout
    assert "opens the door" in detailed and "[PINNED]" in detailed and "version of numpy" in detailed
    listing = json.loads(run("ls", folder, "--json").stdout)
    assert (
        listing["rows"][1]["checkpoint"]["pinned"]
        and listing["rows"][2]["checkpoint"]["metrics"]["reward_mean"] is None
    )


def test_path(folder):
    for words, step in ((["best"], 1), ([], 4), (["latest"], 4), (["2000000"], 2), (["best", "--mode", "min"], 0)):
        if "--mode" in words:
            words += ["--metric", "reward_mean"]
        assert run("path", folder, *words).stdout == f"{folder}/step-{step * 1_000_000:012d}\n"
    picked = run("path", folder, "--pick", input="\n")
    assert picked.stdout == f"{folder}/step-000004000000\n" and "step 1000000" in picked.stderr
    assert run("path", folder, "--pick", input="2\n").stdout == f"{folder}/step-000001000000\n"


def test_picking_shows_nested_metrics_and_says_where_there_is_nothing(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=2) as ckpts:
        ckpts.save(1, {}, {"eval": {"return": 2.5}})
    assert "eval/return 2.5" in run("path", tmp_path / "c", "--pick", input="\n").stderr
    shutil.rmtree(tmp_path / "c" / "step-000000000001")
    with pytest.raises(NotFoundError, match="there is no checkpoint"):
        run("path", tmp_path / "c", "--pick")


def test_prune(folder):
    dry = run("prune", folder, "--keep-last", 1, "--keep-best", "reward_mean:max:1", "--keep", "0.0,2M", "--dry-run")
    assert dry.stdout.split() == ["step-000003000000"] and "1 would go, 4 kept" in dry.stderr
    assert run("prune", folder, "--keep-last", 1, "--keep-every", "2M").stdout.split() == [
        "step-000001000000",
        "step-000003000000",
    ]
    with pytest.raises(click.UsageError, match="no number of steps"):
        run("prune", folder, "--keep", "x")


def test_verify_says_what_is_damaged_by_its_status(folder, tmp_path):
    assert not run("verify", folder).return_value
    (tmp_path / "c" / "step-000002000000" / "model.int64" / "c.0").write_bytes(b"")
    assert run("verify", folder).return_value == 3
    assert not run("verify", folder, "latest").return_value


def test_diff_export_archive_plot(folder, tmp_path):
    out = run("diff", folder, 0, 1_000_000)
    assert "model/w" in out.stdout and "0.1 → 0.05" in out.stdout and "differ" in out.stderr
    assert json.loads(run("diff", folder, 0, 0, "--json").stdout)["differences"] == []
    assert run("archive", folder, 0, "--out", tmp_path / "a").stdout == f"{tmp_path}/a/step-000000000000.tar\n"
    pytest.importorskip("torch")
    assert run("export", folder, "best", tmp_path / "m.safetensors", "--section", "model").exit_code == 0
    pytest.importorskip("matplotlib")
    assert run("plot", folder, tmp_path / "p.svg", "--metric", "reward_mean").exit_code == 0


def test_runs(tmp_path):
    with run_dir(tmp_path / "r", "a", config={"lr": 1}, notes="baseline") as a:
        a.log(10, r=1.0)
        a.finish({"success": 0.5})
    with run_dir(tmp_path / "r", "b", config={"lr": 2}) as b:
        pass
    out = run("ls", tmp_path / "r", group=runs_group).stdout
    assert "baseline" in out and "done" in out and '{"success": 0.5}' in out
    assert len(json.loads(run("ls", tmp_path / "r", "--json", group=runs_group).stdout)) == 2
    assert "config.lr" in run("diff", a.path, b.path, group=runs_group).stdout


def test_every_command_has_an_example():
    for group in (checkpoint_group, runs_group):
        for command in (group, *group.commands.values()):
            assert "Example:" in (command.help or ""), command.name
