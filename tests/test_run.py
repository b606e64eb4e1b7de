"""Runs: names that never collide, and records that survive what ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trajstore.errors import CorruptionError, LockedError, NotFoundError, SchemaError, StateError
from trajstore.run import diff_runs, list_runs, read_run, resume_run, run_dir


def child(code, cwd):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


def test_names_sort_and_do_not_collide(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: run_dir(tmp_path / "results", "push box/ä"), range(16)))
    assert len({run.path for run in runs}) == 16
    assert all(run.path.name.split("-", 1)[1].startswith("push-box") for run in runs)
    for run in runs:
        run.finish()
    assert [info.status for info in list_runs(tmp_path / "results")] == ["done"] * 16


def test_the_record_says_what_ran(tmp_path):
    (tmp_path / "cfg" / "task").mkdir(parents=True)
    (tmp_path / "cfg" / "task" / "a.yaml").write_text("n: 1")
    (tmp_path / "train.sh").write_text("python train.py")
    files = [tmp_path / "cfg", tmp_path / "train.sh"]
    with run_dir(tmp_path / "r", "exp", config={"lr": 3e-4, "shape": (1, 2)}, files=files, notes="first") as run:
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "running" and record["pid"] == os.getpid()
        run.log(1, loss=0.5)
        run.log(2, {"eval": {"success_rate": 0.75}})
        run.note("looks fine")
        run.finish({"success_rate": 0.75})
    info = read_run(run.path)
    assert info.status == "done" and info.result == {"success_rate": 0.75} and info.notes == ("first", "looks fine")
    assert info.step == 2 and info.metrics == {"eval": {"success_rate": 0.75}}
    assert (run / "config" / "cfg" / "task" / "a.yaml").read_text() == "n: 1"
    assert set(info.record["files"]) == {"cfg/task/a.yaml", "train.sh"}
    assert info.record["config"] == {"lr": 3e-4, "shape": {"$tuple": [1, 2]}}
    assert info.record["command"][0] == sys.executable and info.duration is not None
    with pytest.raises(StateError, match="ended"):
        run.log(3, loss=1)


def test_the_source_is_recorded(tmp_path):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "first"]):
        (tmp_path / "train.py").write_text("a = 1\n")
        subprocess.run([*git, *command], check=True)
    (tmp_path / "train.py").write_text("a = 2\n")
    process = child("from trajstore.run import run_dir; run_dir('r', 'x')", tmp_path)
    process.communicate()
    assert process.returncode == 0
    (info,) = list_runs(tmp_path / "r")
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert info.record["git"]["revision"] == head and info.revision == head[:10] + "+"
    assert "+a = 2" in Path(info.path, "source.diff").read_text()


def test_how_a_run_ends_is_known(tmp_path):
    endings = {
        "done": "run.finish(5)",
        "done ": "pass",
        "failed": "raise ValueError('no reward')",
        "interrupted": "\n    raise KeyboardInterrupt",
        "crashed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    }
    for status, ending in endings.items():
        root = tmp_path / status.strip() / str(len(status))
        form = "with run_dir({!r}, 'x') as run:\n    run.log(7, r=1)\n    {}"
        if status == "failed":
            form = "run = run_dir({!r}, 'x'); run.log(7, r=1); {}"
        with open(os.devnull, "w") as null:
            code = "from trajstore.run import run_dir\n" + form.format(str(root), ending)
            env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
            process = subprocess.Popen([sys.executable, "-c", code], stderr=null, env=env)
            process.wait()
        (info,) = list_runs(root)
        assert info.status == status.strip(), status
        assert info.step == 7
    assert "no reward" in list_runs(tmp_path / "failed" / "6")[0].record["error"]


def test_a_running_run_is_running_and_cannot_be_resumed(tmp_path):
    process = child(
        "from trajstore.run import run_dir as d; r = d('r', 'x'); print(1, flush=True); import signal; signal.pause()",
        tmp_path,
    )
    process.stdout.readline()
    (info,) = list_runs(tmp_path / "r")
    assert info.status == "running" and info.duration is None
    with pytest.raises(LockedError):
        resume_run(info.path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_run(info.path).status == "crashed"
    with resume_run(info.path) as run:
        run.finish("good")
    assert read_run(info.path).status == "done" and len(read_run(info.path).record["sessions"]) == 1


def test_metrics_survive_a_resume_at_an_older_step(tmp_path):
    with run_dir(tmp_path, "x") as run:
        for step in range(6):
            run.log(step, loss=float(step))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\n12345678 {"step": 9, "met')  # what a power cut may leave
    with resume_run(run.path, step=2) as run:
        run.log(3, loss=30.0, nan=float("nan"))
    history = run.history.read()
    assert [(e["step"], e["metrics"]["loss"]) for e in history] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert len(run.history.read(abandoned=True)) == 7


def test_two_runs_are_compared(tmp_path):
    with run_dir(tmp_path, "a", config={"lr": 1, "net": {"width": 64, "depth": 2}}) as a:
        a.log(1, r=1.0)
    with run_dir(tmp_path, "b", config={"lr": 2, "net": {"width": 64}}) as b:
        b.log(1, r=2.0)
    difference = diff_runs(a.path, b.path)
    assert difference["config.lr"] == (1, 2) and difference["config.net.depth"] == (2, None)
    assert difference["metrics.r"] == (1.0, 2.0) and "config.net.width" not in difference


def test_what_is_not_there_or_broken_says_so(tmp_path):
    with pytest.raises(NotFoundError):
        read_run(tmp_path)
    with pytest.raises(NotFoundError, match=r"no configuration file"):
        run_dir(tmp_path / "r", "x", files=[tmp_path / "nothing"])
    with pytest.raises(SchemaError):
        run_dir(tmp_path / "q", "x", config={"thing": object()})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(CorruptionError):
        read_run(tmp_path / "broken")
    assert [info.status for info in list_runs(tmp_path)] == ["unreadable"]


def test_a_folder_that_is_not_there_has_no_runs(tmp_path):
    with pytest.raises(NotFoundError, match="there is no folder"):
        list_runs(tmp_path / "results")
