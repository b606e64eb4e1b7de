"""A folder of checkpoints: commit, retention, damage, locks, signals, kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from trajstore.checkpoint import Checkpoints, DamagedCheckpointWarning
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.reading import verify_checkpoint
from trajstore.checkpoint.shelf import Shelf
from trajstore.errors import (
    CorruptionError,
    FormatError,
    LockedError,
    NotFoundError,
    SchemaError,
    StateError,
    StorageError,
)
from trajstore.media.storage import LocalStorage


def state(value, size=1000):
    return {
        "model": {"w": np.full(size, float(value)), "frozen": np.arange(5000.0)},
        "optimizer": {"m": np.ones(size) * value},
    }


def steps(checkpoints):
    return [checkpoint.step for checkpoint in checkpoints.list()]


def run(code, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, **kwargs,
    )  # fmt: skip


# --- the format ---------------------------------------------------------------------------------


def test_each_checkpoint_is_a_zarr_group(tmp_path):
    zarr = pytest.importorskip("zarr")
    big = np.random.default_rng(0).standard_normal(2_500_000).astype("f4")
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(12, {"model": {"w": big, "b": np.arange(3)}, "flags": {"f": np.array([True, False])}}, {"r": 1.0})
    for use_consolidated in (True, False):
        group = zarr.open_group(tmp_path / "c" / "step-000000000012", mode="r", use_consolidated=use_consolidated)
        assert np.array_equal(group["model.float32"][:], big)
        assert np.array_equal(group["model.int64"][:], np.arange(3)) and group["flags.bool"][:].tolist() == [
            True,
            False,
        ]
        assert group.attrs["trajstore_checkpoint"]["metrics"] == {"r": 1.0}
    assert group["model.float32"].chunks == (1 << 20,)


class Held:
    """A checkpoint's files in memory, as much of the storage port as reading needs."""

    def __init__(self, files):
        self.files = files

    def describe(self, key=""):
        return key

    def child(self, key):
        return self

    def read(self, key):
        return self.files[key]

    def size(self, key):
        return len(self.files[key])

    def list(self, folder):
        return [key[len(folder) + 1 :] for key in self.files if key.startswith(f"{folder}/")]


def test_every_flipped_bit_is_found(tmp_path):
    with Checkpoints(tmp_path, rng=False) as ckpts:
        ckpts.save(1, {"m": {"a": np.arange(9.0)}, "n": 5}, {"r": 1.0})
    root = tmp_path / "step-000000000001"
    good = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert len(good) == 5

    def check(files):
        storage = Held(files)
        verify_checkpoint(storage, Shelf(storage).record("it"), Pool(0))

    check(good)
    flipped = 0
    for name, data in good.items():
        for bit in range(8 * len(data)):
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(FormatError):
                check({**good, name: bytes(bad)})
            flipped += 1
    assert flipped == 8 * sum(map(len, good.values())) > 20_000


@pytest.mark.parametrize("harm", ["truncate", "remove", "swap", "stranger"])
def test_other_damage_is_found(tmp_path, harm):
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, state(1))
        ckpts.save(2, state(2))
    chunk = tmp_path / "c" / "step-000000000002" / "model.float64" / "c.0"
    if harm == "truncate":
        chunk.write_bytes(chunk.read_bytes()[:-1])
    elif harm == "remove":
        chunk.unlink()
    elif harm == "swap":  # a whole chunk, with a checksum of its own, of another time
        shutil.copy(tmp_path / "c" / "step-000000000001" / "model.float64" / "c.0", chunk)
    else:
        (chunk.parent / "c.1").write_bytes(b"")
    ckpts = Checkpoints(tmp_path / "c", read_only=True)
    ((checkpoint, problem),) = ckpts.verify()
    assert checkpoint.step == 2 and str(chunk.parent) in problem
    assert ckpts.verify(1) == []


# --- fallback -----------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["zarr.json", "model.float64/c.0", "structure/c.0"])
def test_restore_steps_back_over_damage_and_says_so(tmp_path, victim):
    with Checkpoints(tmp_path / "c") as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state(step))
    file = tmp_path / "c" / "step-000000000003" / victim
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.unlink()  # not into what may be a hard link's bytes
    file.write_bytes(data)
    with Checkpoints(tmp_path / "c") as ckpts:
        with pytest.warns(DamagedCheckpointWarning, match="stepping over step-000000000003"):
            restored = ckpts.restore()
        assert restored.step == 2 and restored.state["model"]["w"][0] == 2
        with pytest.raises((CorruptionError, NotFoundError)):
            ckpts.restore(step=3)
        ckpts.save(3, state(33))  # the run reaches the step again
        assert ckpts.restore().state["model"]["w"][0] == 33


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "c") as ckpts:
        with pytest.raises(NotFoundError, match="no checkpoint"):
            ckpts.restore()
        ckpts.save(1, {})
        ckpts.wait()
        (tmp_path / "c" / "step-000000000001" / "zarr.json").write_bytes(b"{}")
    with (
        pytest.raises(CorruptionError, match="none of the 1"),
        pytest.warns(DamagedCheckpointWarning),
        Checkpoints(tmp_path / "c", read_only=True) as ckpts,
    ):
        ckpts.restore()


def test_a_newer_format_says_to_upgrade(tmp_path, monkeypatch):
    from trajstore.checkpoint import record
    from trajstore.errors import UnsupportedFormatError

    monkeypatch.setattr(record, "FORMAT", 2)
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, {})
    monkeypatch.setattr(record, "FORMAT", 1)
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        Checkpoints(tmp_path / "c", read_only=True)._shelf.record("step-000000000001")


# --- retention ----------------------------------------------------------------------------------


def test_retention_is_the_union_of_its_rules(tmp_path):
    rewards = [5, 9, float("nan"), 1, 8, 2, 3, 4, 0, 6]
    with Checkpoints(tmp_path / "c", keep_last=2, keep_best=("eval/reward", "max", 2), keep_every=400) as ckpts:
        for i, reward in enumerate(rewards):
            ckpts.save(100 * i, state(i), {"eval": {"reward": reward}})
        ckpts.wait()
        assert steps(ckpts) == [0, 100, 400, 800, 900]
        assert ckpts.best().step == 100 and ckpts.latest().step == 900
        assert ckpts.restore(step="best").step == 100
        assert ckpts.best("eval.reward", "min").step == 800
        assert [entry["step"] for entry in ckpts.history()] == [100 * i for i in range(10)]


def test_pins_stay_until_unpinned(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=1) as ckpts:
        ckpts.save(1, state(1))
        ckpts.wait()
        ckpts._shelf.set_mark("step-000000000001", pinned=True)
        for step in (2, 3):
            ckpts.save(step, state(step))
        ckpts.wait()
        assert steps(ckpts) == [1, 3]
        ckpts._shelf.set_mark("step-000000000001", pinned=False)
        ckpts.save(4, state(4))
        ckpts.wait()
        assert steps(ckpts) == [4]


def test_milestones_keep_the_model_alone(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=1, keep_every=2, milestone="model") as ckpts:
        for step in range(6):
            ckpts.save(step, state(step))
        ckpts.wait()
        found = ckpts.list()
        assert [(c.step, c.complete) for c in found] == [(0, False), (2, False), (4, False), (5, True)]
        assert ckpts.load(4, "model/w")[0] == 4 and ckpts.verify() == []
        with pytest.raises(NotFoundError, match="milestone that kept only model"):
            ckpts.load(4, "optimizer")
        assert found[0].stored_bytes < found[-1].stored_bytes
        assert ckpts.restore(into={"model": {"w": np.zeros(1000)}}).step == 5


def test_unchanged_chunks_are_links_and_counted(tmp_path):
    frozen = np.random.default_rng(0).standard_normal(1_200_000)  # 9.6 MB: two whole chunks and a part
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        for step in range(3):
            ckpts.save(step, {"model": {"frozen": frozen}, "head": {"w": np.full(10, step)}})
        ckpts.wait()
        assert ckpts.stats["linked_bytes"] > 2 * 0.8 * 9.6e6
        assert (tmp_path / "c/step-000000000002/model.float64/c.1").stat().st_nlink == 3
        frozen[-1] = 0  # one chunk of three changes
        ckpts.save(3, {"model": {"frozen": frozen}, "head": {"w": np.full(10, 3)}})
        ckpts.wait()
        assert [(tmp_path / f"c/step-000000000003/model.float64/c.{i}").stat().st_nlink for i in range(3)] == [4, 4, 1]
    with Checkpoints(tmp_path / "c", keep_last=1) as ckpts:  # another session links too, and removing frees the others
        ckpts.save(4, {"model": {"frozen": frozen}})
        ckpts.wait()
        assert (tmp_path / "c/step-000000000004/model.float64/c.0").stat().st_nlink == 1
        assert ckpts.verify() == [] and np.array_equal(ckpts.restore().state["model"]["frozen"], frozen)


def test_a_damaged_chunk_is_not_linked_to(tmp_path):
    frozen = np.arange(1_000_000.0)
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        ckpts.save(1, {"m": {"w": frozen}})
        ckpts.wait()
        chunk = tmp_path / "c/step-000000000001/m.float64/c.0"
        data = bytearray(chunk.read_bytes())
        data[1000] ^= 4
        chunk.write_bytes(data)
        ckpts.save(2, {"m": {"w": frozen}})
        assert [checkpoint.step for checkpoint, _ in ckpts.verify()] == [1]


def test_saving_a_step_again_keeps_both(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        for value in (1, 2, 3):
            ckpts.save(7, state(value), final=value == 3)
        ckpts.wait()
        assert [c.name for c in ckpts.list()] == ["step-000000000007", "step-000000000007-2", "step-000000000007-3"]
        assert ckpts.restore(step=7).state["model"]["w"][0] == 3 and ckpts.latest().final


@pytest.mark.parametrize("abandoned", ["keep", "prune"])
def test_going_on_from_an_older_step(tmp_path, abandoned):
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        for step in (1, 2, 3, 4):
            ckpts.save(step, state(step), {"r": step})
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        ckpts.restore(step=2, abandoned=abandoned)
        assert steps(ckpts) == [1, 2, 3, 4], "nothing goes before the new branch has a checkpoint of its own"
        ckpts.save(3, state(33), {"r": 33})
        ckpts.wait()
        assert steps(ckpts) == ([1, 2, 3, 4, 3] if abandoned == "keep" else [1, 2, 3])
        assert ckpts.restore().state["model"]["w"][0] == 33
        assert [(e["step"], e["metrics"]["r"]) for e in ckpts.history()] == [(1, 1), (2, 2), (3, 33)]
        assert len(ckpts.history(abandoned=True)) == 5
        parents = {c.serial: ckpts._shelf.record(c.name).parent for c in ckpts.list()}
        assert parents[5] == ckpts._shelf.record("step-000000000002").uuid


def test_bad_rules_and_steps(tmp_path):
    for bad in (
        {"keep_last": 0},
        {"keep_best": ("r", "best", 1)},
        {"keep_every": 0},
        {"on_busy": "drop"},
        {"on_signal": "x"},
    ):
        with pytest.raises(SchemaError):
            Checkpoints(tmp_path / "bad", **bad)
    with Checkpoints(tmp_path / "c") as ckpts:
        for step in (-1, 1.5, "7", True):
            with pytest.raises(SchemaError):
                ckpts.save(step, {})
        assert ckpts.save(np.int64(3), {}) and ckpts.save(4.0, {})
        with pytest.raises(SchemaError, match="metric"):
            ckpts.save(5, {}, {"r": [1, 2]})


# --- who may write ------------------------------------------------------------------------------


def test_two_processes_are_refused_and_readers_are_not(tmp_path):
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, state(1))
        ckpts.wait()
        with pytest.raises(LockedError, match=str(os.getpid())):
            Checkpoints(tmp_path / "c")
        reader = Checkpoints(tmp_path / "c", read_only=True)
        assert reader.restore().step == 1
        with pytest.raises(StateError, match="read_only"):
            reader.save(2, {})
    with Checkpoints(tmp_path / "c"):
        pass
    with pytest.raises(StateError, match="closed"):
        ckpts.save(2, {})
    assert ckpts.verify() == [] and ckpts.restore().step == 1, "what is closed can still be read"


def test_a_forked_child_may_not_use_it(tmp_path):
    child = run(f"""
        import os, sys
        from trajstore.checkpoint import Checkpoints
        c = Checkpoints({str(tmp_path / "c")!r}); c.save(1, {{"a": 1}}); c.wait()
        pid = os.fork()
        if pid == 0:
            try:
                c.save(2, {{}})
            except Exception as error:
                sys.exit(7 if type(error).__name__ == "StateError" else 1)
            sys.exit(2)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        c.save(3, {{}}); c.close(); print([x.step for x in c.list()])
        """)
    out, err = child.communicate(timeout=300)
    assert out.split("\n")[:2] == ["7", "[1, 3]"], err


# --- the background -----------------------------------------------------------------------------


class Slow(LocalStorage):
    """A disk that waits for a gate before each chunk."""

    def __init__(self, root):
        super().__init__(root)
        self.gate = threading.Event()

    def __reduce__(self):
        raise TypeError

    def write(self, key, pieces, **kwargs):
        if key.endswith("c.0"):
            self.gate.wait(120)
        super().write(key, pieces, **kwargs)


def test_a_busy_disk_makes_the_third_save_wait_or_skip(tmp_path):
    storage = Slow(tmp_path / "c")
    ckpts = Checkpoints(storage, on_busy="skip")
    assert [ckpts.save(step, state(step)) for step in range(4)] == [True, True, False, False]
    assert ckpts.stats["skipped"] == 2
    storage.gate.set()
    ckpts.close()
    assert steps(ckpts) == [0, 1]

    storage = Slow(tmp_path / "d")
    ckpts = Checkpoints(storage, keep_last=None)
    waits = ckpts._saver._changed.wait_for

    def open_once_a_save_has_to_wait(predicate, *timeout):
        if not predicate() and threading.current_thread() is threading.main_thread():
            storage.gate.set()
        return waits(predicate, *timeout)

    ckpts._saver._changed.wait_for = open_once_a_save_has_to_wait
    assert all(ckpts.save(step, state(step)) for step in range(4))
    ckpts.close()
    assert steps(ckpts) == [0, 1, 2, 3]
    assert [ckpts.load(step, "model/w")[0] for step in range(4)] == [0, 1, 2, 3], "arenas were mixed up"


def test_the_state_may_change_after_save(tmp_path):
    storage = Slow(tmp_path / "c")
    array, values = np.zeros(1000), [1, 2]
    with Checkpoints(storage) as ckpts:
        ckpts.save(1, {"a": array, "v": values})
        array += 1
        values.append(3)
        storage.gate.set()
        back = ckpts.restore().state
    assert not back["a"].any() and back["v"] == [1, 2]


class Failing(LocalStorage):
    def __init__(self, root, name="c.0"):
        super().__init__(root)
        self.fail, self.name = False, name

    def write(self, key, pieces, **kwargs):
        if self.fail and key.endswith(self.name):
            raise StorageError("could not write: no space left on device", errno=28)
        super().write(key, pieces, **kwargs)


def test_an_error_surfaces_at_the_next_call_and_costs_only_that_save(tmp_path):
    storage = Failing(tmp_path / "c")
    ckpts = Checkpoints(storage)
    ckpts.save(1, state(1))
    ckpts.wait()
    storage.fail = True
    ckpts.save(2, state(2))
    with pytest.raises(StorageError, match="step 2 was not saved") as caught:
        ckpts.wait()
    assert caught.value.errno == 28
    storage.fail = False
    ckpts.save(3, state(3))
    ckpts.close()
    assert steps(ckpts) == [1, 3] and ckpts.stats["failed"] == 1
    assert [name for name in os.listdir(tmp_path / "c" / "__trajstore") if name.startswith("tmp")] == []


def test_a_clean_up_that_fails_does_not_call_the_checkpoint_lost(tmp_path):
    class NoRename(LocalStorage):
        def rename(self, source, target):
            if "trash" in target:
                raise StorageError("could not rename: permission denied", errno=13)
            super().rename(source, target)

    ckpts = Checkpoints(NoRename(tmp_path / "c"), keep_last=1)
    ckpts.save(1, state(1))
    ckpts.save(2, state(2))
    with pytest.raises(StorageError, match="step 2 was saved, but the clean-up"):
        ckpts.wait()
    ckpts.close()
    assert steps(ckpts) == [1, 2]


def test_close_raises_but_does_not_hide_the_error_on_its_way(tmp_path):
    storage = Failing(tmp_path / "c")
    storage.fail = True
    with pytest.raises(StorageError), Checkpoints(storage) as ckpts:
        ckpts.save(1, state(1))
    with pytest.raises(KeyError), Checkpoints(storage) as ckpts:  # noqa: PT012  # both lines are the point
        ckpts.save(1, state(1))
        raise KeyError("the loop's own")


def test_exit_drains(tmp_path):
    child = run(f"""
        import numpy as np
        from trajstore.checkpoint import Checkpoints
        c = Checkpoints({str(tmp_path / "c")!r}, keep_last=None)
        for step in range(5):
            c.save(step, {{"a": np.random.rand(500_000)}})
        del c
        """)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    ckpts = Checkpoints(tmp_path / "c", read_only=True)
    assert steps(ckpts) == [0, 1, 2, 3, 4] and ckpts.verify() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_marks_and_lets_the_process_end(tmp_path, number):
    child = run(f"""
        import time, sys, numpy as np
        from trajstore.checkpoint import Checkpoints
        c = Checkpoints({str(tmp_path / "c")!r}, keep_last=None)
        for step in range(1_000_000):
            c.save(step, {{"a": np.full(300_000, step)}})
            print(step, flush=True)
        """)
    for line in child.stdout:
        if int(line) == 3:
            break
    child.send_signal(number)
    accepted = [int(line) for line in child.stdout]
    child.communicate(timeout=300)
    assert child.returncode == (-signal.SIGTERM if number == signal.SIGTERM else -signal.SIGINT)
    ckpts = Checkpoints(tmp_path / "c", read_only=True)
    last = ckpts.list()[-1]
    assert last.interrupted and last.step >= max(accepted, default=3), "what was accepted was not drained"
    assert not any(checkpoint.interrupted for checkpoint in ckpts.list()[:-1])
    assert ckpts.verify() == []


def test_a_flag_lets_the_loop_save_once_more(tmp_path):
    child = run(f"""
        import os, signal
        from trajstore.checkpoint import Checkpoints
        with Checkpoints({str(tmp_path / "c")!r}, on_signal="flag") as c:
            for step in range(100):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                if c.interrupted:
                    c.save(step, {{"step": step}})
                    break
        print(c.latest().step, c.latest().interrupted)
        """)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, out) == (0, "5 True\n"), err


def test_handlers_that_were_there_run_and_come_back(tmp_path):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(ckpts.list()[-1].step))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        ckpts = Checkpoints(tmp_path / "c")
        ckpts.save(4, state(4))
        signal.raise_signal(signal.SIGTERM)
        assert calls == [4]
        ckpts.close()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


VICTIM = """
    import sys, numpy as np
    from trajstore.checkpoint import Checkpoints
    path, first = sys.argv[1], int(sys.argv[2])
    c = Checkpoints(path, keep_last=3, keep_best=("r", "max", 1), keep_every=7, milestone="model")
    print("open", max([x.step for x in c.list()], default=-1), flush=True)
    frozen = np.arange(200_000.0)
    for step in range(first, first + 10_000):
        rng = np.random.default_rng(step)
        c.save(step, {"model": {"w": rng.standard_normal(150_000), "frozen": frozen}, "opt": {"m": rng.random(1000)}},
               {"r": float(rng.random())})
        if step % 3 == 0:
            c.wait()
            print("durable", step, flush=True)
"""


def expect(step):
    rng = np.random.default_rng(step)
    return rng.standard_normal(150_000), rng.random(1000)


@pytest.mark.parametrize("kills", [int(os.environ.get("TRAJSTORE_KILLS", "12"))])
def test_kills_during_saves_lose_nothing_acknowledged(tmp_path, kills):
    path, first, rng = tmp_path / "c", 0, np.random.default_rng(0)
    for number in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(VICTIM), str(path), str(first)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        durable = int(child.stdout.readline().split()[1])
        if number % 2 == 0:  # else the kill may come before anything of this session is durable
            durable = int(child.stdout.readline().split()[1])
        timer = threading.Timer(rng.uniform(0, 0.45), child.kill)
        timer.start()
        for line in child.stdout:
            durable = int(line.split()[1])
        child.wait()
        timer.join()
        child.stdout.close()
        if not path.exists():
            continue
        ckpts = Checkpoints(path, read_only=True)
        if durable < 0 and not ckpts.list():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves no damage to step over
            restored = ckpts.restore()
        assert restored.step >= durable
        w, m = expect(restored.step)
        assert np.array_equal(restored.state["model"]["w"], w) and np.array_equal(restored.state["opt"]["m"], m)
        assert ckpts.verify() == []
        for checkpoint in ckpts.list():
            assert np.array_equal(ckpts.load(checkpoint.name, "model/w"), expect(checkpoint.step)[0])
        first = restored.step + 1
    assert first > 0


def test_scratch_of_the_killed_goes_at_the_next_opening(tmp_path):
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, state(1))
    (tmp_path / "c" / "__trajstore" / "tmp.123").mkdir()
    (tmp_path / "c" / "__trajstore" / "tmp.123" / "c.0").write_bytes(b"x")
    (tmp_path / "c" / "__trajstore" / "trash").mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "c" / "step-000000000001", tmp_path / "c" / "__trajstore" / "trash" / "x")
    Checkpoints(tmp_path / "c").close()
    assert not (tmp_path / "c/__trajstore/tmp.123").exists() and not os.listdir(tmp_path / "c/__trajstore/trash")
    assert (tmp_path / "c/step-000000000001").exists()


def test_nothing_is_counted_while_somebody_looks_at_the_figures(tmp_path, monkeypatch):
    from trajstore.checkpoint import saver

    look, count = saver.asdict, saver.Saver._count
    written, looking, counted = threading.Event(), threading.Event(), threading.Event()

    def slow_count(*arguments):
        written.set()
        assert looking.wait(60)
        count(*arguments)
        counted.set()

    def slow_look(stats):
        looking.set()
        assert not counted.wait(0.2)
        return look(stats)

    monkeypatch.setattr(saver.Saver, "_count", slow_count)
    monkeypatch.setattr(saver, "asdict", slow_look)
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, {"x": np.arange(5)})
        assert written.wait(60)
        assert ckpts.stats["saved"] == 0
        assert counted.wait(60)
    assert Checkpoints(tmp_path / "c").latest().step == 1
