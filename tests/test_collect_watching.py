"""What a collection says of itself: figures, loggers, and the progress bar."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import ProgressBar
from trajstore.monitor import PerformanceMonitor, log_values_to


def test_the_writer_tells_what_it_has_done(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        for _ in range(3):
            writer.append({"x": np.zeros((1000, 100), np.uint8)})
            writer.commit()
        stats = writer.stats
    assert (stats["trajectories"], stats["steps"]) == (3, 3000)
    assert stats["commits"] == 4  # the first makes the store
    assert 0 < stats["commit_last_seconds"] <= stats["commit_seconds"]
    assert stats["raw_bytes"] >= 300_000
    assert stats["ratio"] > 10
    assert stats["encode_bytes_per_second"] > 0
    assert stats["queue_bytes"] == 0 < stats["queue_peak_bytes"]
    with trajstore.create(tmp_path / "s", resume=True) as writer:
        assert (writer.stats["trajectories"], writer.stats["steps"]) == (0, 0)


class Scalars:
    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, int | None]] = {}

    def add_scalar(self, tag: str, value: float, step: int | None = None) -> None:
        self.seen[tag] = value, step


class Run:
    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.seen = values, step


def test_timers_and_figures_go_to_loggers() -> None:
    monitor = PerformanceMonitor(cuda=False)
    monitor.record("rollout", 2.0)
    monitor.record("rollout", 4.0)
    scalars, run, called = Scalars(), Run(), []
    monitor.log(scalars, 7, stats={"stall_seconds": 0.5})
    monitor.log(run, 8)
    monitor.log(lambda values, step: called.append((values, step)))
    assert scalars.seen == {"perf/rollout": (3.0, 7), "perf/stall_seconds": (0.5, 7)}
    assert run.seen == ({"perf/rollout": 3.0}, 8)
    assert called == [({"perf/rollout": 3.0}, None)]
    with pytest.raises(TypeError, match="neither add_scalar nor log"):
        log_values_to(3, {})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_on_a_terminal_only(tmp_path: Path) -> None:
    terminal: Any = Terminal()
    with trajstore.create(tmp_path / "s", target=4) as writer:
        with ProgressBar(writer, stream=io.StringIO()) as quiet:
            pass
        assert quiet._stream.getvalue() == ""  # type: ignore[attr-defined]
        with ProgressBar(writer, stream=terminal, every=0.01) as bar:
            writer.append({"x": np.zeros(5)})
            while "1 of 4" not in terminal.getvalue():
                time.sleep(0.01)
            assert bar.line().startswith("[######......")
            writer.append({"x": np.zeros(5)})
        writer.target = None
        assert bar.line().startswith("2 trajectories")
    assert terminal.getvalue().endswith("\n")
    assert "2 of 4" in terminal.getvalue()


def test_the_guide_shows_the_very_collector_that_the_demo_runs() -> None:
    pytest.importorskip("gymnasium")
    import inspect

    from trajstore import vectordemo

    guide = Path(__file__).resolve().parent.parent / "docs" / "collect.md"
    assert inspect.getsource(vectordemo.collect) in guide.read_text()


def test_the_demonstration_learns_and_records(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    from trajstore import vectordemo

    report = vectordemo.run(str(tmp_path / "s"), num_envs=8, iterations=4, horizon=64)
    assert report["trajectories"] > 50
    assert report["steps"] <= 8 * 4 * 64
    assert "record" in report["summary"]
    ds = trajstore.open(tmp_path / "s")
    for trajectory in ds[:20]:
        obs, reward = trajectory["obs"][:], trajectory["reward"][:]
        assert len(obs) == len(reward) + 1 == len(trajectory["action"]) + 1
        np.testing.assert_allclose(obs[1:, 0], obs[:-1, 0] + 0.02 * obs[:-1, 1], atol=1e-5)


def test_the_demonstration_has_a_command(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    testing = pytest.importorskip("click.testing")
    from trajstore.cli import main

    shown = testing.CliRunner().invoke(main, ["demo", "--vector", str(tmp_path / "s")])
    assert shown.exit_code == 0, shown.output
    assert "the mean length of an episode went from" in shown.output
    assert len(trajstore.open(tmp_path / "s")) > 100
