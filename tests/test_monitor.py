from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

from trajstore.monitor import PerformanceMonitor


def test_statistics_of_the_last_values():
    monitor = PerformanceMonitor()
    values = [0.1 * i for i in range(1, 21)]
    for value in values:
        monitor.record("train", value)
    stats = monitor.get_stats(window=5)["train"]
    recent = values[-5:]
    assert stats["count"] == 5 and stats["min"] == recent[0] and stats["max"] == recent[-1]
    assert stats["mean"] == pytest.approx(statistics.mean(recent))
    assert stats["std"] == pytest.approx(statistics.stdev(recent))
    assert stats["total"] == pytest.approx(sum(recent))
    assert monitor.get_stats(window=100)["train"]["count"] == 20
    assert monitor.log_values(window=5) == {"perf/train": pytest.approx(statistics.mean(recent))}


def test_one_value_deviates_by_nothing():
    monitor = PerformanceMonitor()
    monitor.record("once", 3)
    assert monitor.get_stats()["once"]["std"] == 0.0


def test_timers_record_also_when_the_block_raises():
    monitor = PerformanceMonitor()
    with pytest.raises(KeyError), monitor.timer("fails"):
        raise KeyError
    monitor.start_timer("manual")
    elapsed = monitor.end_timer("manual")
    assert elapsed is not None and elapsed >= 0
    assert monitor.end_timer("never started") is None
    assert set(monitor.get_stats()) == {"fails", "manual"}
    assert "fails" in monitor.get_summary() and "Performance Summary" in monitor.get_summary()
    monitor.reset()
    assert monitor.get_stats() == {} and monitor.end_timer("manual") is None


def test_only_the_latest_values_are_kept_when_asked():
    monitor = PerformanceMonitor(keep=10)
    for value in range(1000):
        monitor.record("t", value)
    assert len(monitor.timings["t"]) <= 20 and monitor.timings["t"][-1] == 999.0


def test_timing_does_not_load_torch():
    code = (
        "import sys; from trajstore.monitor import PerformanceMonitor as M; m = M()\n"
        "with m.timer('a'): pass\n"
        "m.get_stats(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_device_time_is_measured_where_cuda_is_in_use():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.init()
    monitor = PerformanceMonitor()
    a = torch.randn(2000, 2000, device="cuda")
    with monitor.timer("matmul"):
        for _ in range(20):
            a = a @ a / 2000
    assert monitor.get_stats()["matmul"]["mean"] > 0
