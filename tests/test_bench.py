"""The bench's own honesty: results are compared, ratios face the right way, and every row is named once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import _load
from bench.data import COLUMNS, routes, trajectory
from bench.peers import users_layout
from bench.profiles import shares, symbol_shares
from bench.remarks import REMARKS
from bench.report import GROUPS, Report, table, with_report
from bench.rows import Bench, Claim, Ratio, Times, WrongResultError


def test_contestants_that_read_different_bytes_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, short=True)
    with pytest.raises(WrongResultError, match="other and trajstore differ"):
        bench.compare({"trajstore": lambda: np.zeros(3), "other": lambda: np.array([0, 0, -0.0])})
    with pytest.raises(WrongResultError):
        bench.compare({"trajstore": lambda: {"a": np.zeros(3)}, "other": lambda: {"b": np.zeros(3)}})


def test_every_contestant_is_prepared_before_each_of_its_calls(tmp_path: Path) -> None:
    done: list[str] = []
    names = ("trajstore", "other")
    work = {name: lambda name=name: done.append(f"call {name}") for name in names}
    Bench(tmp_path, short=True).compare(work, prepare=lambda name: done.append(f"prepare {name}"), repeats=2)
    assert done == [f"{what} {name}" for _ in range(3) for name in names for what in ("prepare", "call")]


def test_ratios_say_how_many_times_better_or_how_many_times_the_cost() -> None:
    times = Times({"trajstore": [1.0, 2.0, 1.0], "peer": [10.0, 10.0, 30.0]}, {"trajstore": 0, "peer": 0})
    faster = times.claim("w", "peer", ">= 10")
    assert faster.ratio == Ratio(10.0, 5.0, 30.0)
    assert faster.reached
    assert not times.claim("w", "peer", ">= 11").reached
    cost = times.claim("w", "peer", "<= 0.05")
    assert cost.ratio.median == 0.1
    assert not cost.reached
    assert times.claim("w", "peer").reached is None


def a_report() -> Report:
    peak = {"trajstore": 1 << 20, "peer": 0}
    short = Claim("work", "peer", Ratio(2.0, 1.0, 3.0), ">= 4", "note", peak, Ratio(1.0, 1.0, 1.0))
    claims = {"ingest": [short], "append": [Claim("other", "peer", Ratio(1.2, 1.0, 3.0), "<= 1.5")]}
    return Report(
        True,
        rows=claims,
        groups={"ingest": "Collecting", "append": "Reading"},
        seconds={"ingest": (60.0, 1.0)},
        skipped={"merge": "why"},
        versions={"numpy": "2"},
    )


def test_the_page_keeps_what_stands_around_the_report() -> None:
    report = a_report()
    page = "before\n<!-- begin: python -m bench -->\nan earlier run\n<!-- end -->\nafter\n"
    made = with_report(page, report)
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert "an earlier run" not in made
    for group, name in (("Collecting", "ingest"), ("Reading", "append")):
        assert f"### {group}\n\n{table(report.rows[name])}" in made
    assert "1 of 2 bars reached" in made
    assert "merge (why)" in made
    assert with_report(made, report) == made


def test_each_bar_that_is_not_reached_is_explained() -> None:
    report = a_report()
    explained = with_report("", report).partition("and why")[2]
    assert "(peer: 2.00× of ≥ 4)" in explained
    assert REMARKS["ingest"] in explained
    assert "other" not in explained


def test_a_report_comes_back_from_json() -> None:
    report = a_report()
    found = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert with_report("", found) == with_report("", report)
    assert found.claims == report.claims


def test_every_remark_is_of_a_row() -> None:
    groups, _ = _load()
    known = {name for name in REMARKS if name in groups}
    missing = set(REMARKS) - known
    # Rows whose packages are not installed here are not loaded.
    assert not missing or any(name.split("-")[0] in ("checkpoint", "replay", "hdf5", "loader") for name in missing)
    assert set(groups.values()) <= set(GROUPS)


def test_the_samples_are_as_long_as_asked_for() -> None:
    found = routes(200)
    assert sum(len(route["obs"]) for route in found) >= 200
    fields, columns = trajectory(found[0])
    assert set(columns) == set(COLUMNS)
    assert {len(value) for value in fields.values()} == {len(found[0]["obs"])}
    assert len({int(route["seed"]) for route in found}) == len(found)


def test_an_archive_of_repeated_samples_holds_each_of_them(tmp_path: Path) -> None:
    found = routes(1_000)
    np.savez(tmp_path / "routes.npz", **users_layout.shard(found))
    assert (tmp_path / "routes.npz").stat().st_size > sum(route["obs"].nbytes for route in found)


def test_samples_of_a_profile_count_for_their_innermost_work() -> None:
    top = "<module> (bench/profiles.py:1);_sampled (bench/profiles.py:2)"
    encoder = "_bootstrap (threading.py:1);work (ingest.py:2)"
    found = shares(
        [
            f"{top};append (writer.py:3);_contig_to_contig (numpy/_umath.so);0x1 (libc.so.6) 1",
            f"{encoder};encode (shard.py:4);compress (blosc.c:5);ZSTD_fast (zstd.c:6) 4",
            f"{encoder};encode (shard.py:4);compress (blosc.c:5);pthread_cond_timedwait (libc.so.6);0x2 (libc.so.6) 2",
            f"{encoder};pack (encoding.py:3);multiply (numpy/_umath.so) 1",
            f"{encoder};look_up (encoding.py:3);array_take (numpy/_umath.so) 1",
            f"{encoder};get (queue.py:3);PyThread_acquire_lock_timed (libpython.so);0x2 (libc.so.6) 90",
            "<module> (numpy/__init__.py:1) 90",
            "gc_collect_main (libpython.so);0x1 (libc.so.6) 90",
            f"{encoder};plan (appender.py:7) 1",
        ]
    )
    assert {kind: share for kind, share in found.items() if share} == {
        "copy of rows": 0.1,
        "codec": 0.4,
        "waiting for the interpreter's lock": 0.2,
        "packing and its check, or unpacking": 0.2,
        "Python, NumPy's and numcodecs' wrappers, threads": 0.1,
    }


def test_samples_of_the_kernel_count_for_library_and_symbol() -> None:
    numpy = "(/usr/lib/numpy/_core/_multiarray_umath.so)"
    found = symbol_shares(
        [
            "  7f01 LZ4_compress_fast (/usr/lib/numcodecs/blosc.so)",
            "  7f02 [unknown] (/usr/lib/numcodecs/blosc.so)",
            "ffff03 clear_page_erms ([kernel.kallsyms])",
            "  7f04 __memmove_avx512_unaligned_erms (/usr/lib/libc.so.6)",
            "  7f05 crc32c::ExtendSse42 (/usr/lib/libcrc32c.so)",
            f"  7f06 FLOAT_multiply {numpy}",
            f"  7f07 PyArray_TakeFrom {numpy}",
            f"  7f08 PyArray_FromAny_int {numpy}",
            "  7f09 take_gil (/usr/lib/libpython.so)",
            "",
            "  7f0a _PyEval_EvalFrameDefault (/usr/lib/libpython.so)",
        ]
    )
    assert found is not None
    assert {kind: round(share, 1) for kind, share in found.items()} == {
        "codec": 0.2,
        "the kernel: files, page faults, scheduling": 0.1,
        "copy of rows, checksums": 0.2,
        "packing and its check, or unpacking": 0.2,
        "Python, NumPy's and numcodecs' wrappers, threads": 0.3,
    }
    assert symbol_shares([]) is None
