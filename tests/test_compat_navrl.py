"""NavRL's saver and loader: its names, its files, and none of its losses."""

from __future__ import annotations

import io
import os
import threading

import pytest

torch = pytest.importorskip("torch")
lz4_frame = pytest.importorskip("lz4.frame")

from trajstore.compat import navrl  # noqa: E402
from trajstore.compat.navrl import (  # noqa: E402
    AsyncCheckpointSaver,
    PerformanceMonitor,
    format_checkpoint_name,
    get_model_size,
    load_checkpoint,
    print_model_info,
)
from trajstore.errors import (  # noqa: E402
    CorruptionError,
    MissingDependencyError,
    NotFoundError,
    SchemaError,
    StateError,
    UnsupportedFormatError,
)


def save_the_old_way(checkpoint, path, compress):
    """What the users' saver writes: an LZ4 frame over torch.save's bytes, or those bytes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data = buffer.getvalue()
    if compress:
        path, data = f"{path}.lz4", lz4_frame.compress(data, compression_level=9)
    with open(path, "wb") as file:
        file.write(data)


def load_the_old_way(path):
    """What the users' loader does: the compressed file if there is one."""
    if os.path.exists(path + ".lz4"):
        with open(path + ".lz4", "rb") as file:
            return torch.load(io.BytesIO(lz4_frame.decompress(file.read())), map_location="cpu")
    return torch.load(path, map_location="cpu")


def a_checkpoint(value=0.0, iteration=7):
    model = torch.nn.Linear(4, 3)
    torch.nn.init.constant_(model.weight, value)
    return {"model_state_dict": model.state_dict(), "iteration": iteration, "env_frames": 123}


def same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            same(value, right[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype and torch.equal(value, right[key])
        else:
            assert value == right[key]


@pytest.mark.parametrize("compress", [True, False])
def test_the_old_loader_reads_what_is_saved_and_the_new_one_what_was_saved(tmp_path, compress):
    path = str(tmp_path / "checkpoint_7.pt")
    saver = AsyncCheckpointSaver(max_queue_size=3, verbose=False)
    checkpoint = a_checkpoint(1.5)
    saver.save_async(checkpoint, path, compress=compress, metadata={"iteration": 7, "frames": 123})
    saver.shutdown(timeout=300)
    assert "metadata" not in checkpoint  # theirs wrote into the caller's copy
    for loaded in (load_the_old_way(path), load_checkpoint(path)):
        assert loaded.pop("metadata") == {"iteration": 7, "frames": 123}
        same(loaded, checkpoint)

    old = str(tmp_path / "old.pt")
    save_the_old_way(checkpoint, old, compress)
    same(load_checkpoint(old), checkpoint)
    if compress:
        same(load_checkpoint(old + ".lz4"), checkpoint)


def test_the_newer_of_plain_and_compressed_is_loaded(tmp_path):
    path = str(tmp_path / "c.pt")
    save_the_old_way(a_checkpoint(1.0), path, compress=True)
    save_the_old_way(a_checkpoint(2.0), path, compress=False)
    os.utime(path + ".lz4", ns=(1, 1))
    assert load_checkpoint(path)["model_state_dict"]["weight"][0, 0] == 2.0
    os.utime(path, ns=(0, 0))
    assert load_checkpoint(path)["model_state_dict"]["weight"][0, 0] == 1.0


def test_a_plain_save_does_not_leave_an_older_compressed_one_for_the_old_loader(tmp_path):
    path = str(tmp_path / "c.pt")
    save_the_old_way(a_checkpoint(1.0), path, compress=True)
    saver = AsyncCheckpointSaver(verbose=False)
    saver.save_async(a_checkpoint(2.0), path, compress=False)
    saver.shutdown(timeout=300)
    assert load_the_old_way(path)["model_state_dict"]["weight"][0, 0] == 2.0


def test_shutdown_saves_everything_that_was_queued_and_a_full_queue_waits(tmp_path):
    saver = AsyncCheckpointSaver(max_queue_size=2, verbose=False)
    for i in range(12):
        saver.save_async(a_checkpoint(float(i), i), str(tmp_path / f"c{i}.pt"), compress=i % 2 == 0)
    saver.shutdown(timeout=300)
    stats = saver.get_stats()
    assert stats.keys() == {
        "save_count", "total_saved_bytes", "total_compressed_bytes", "compression_ratio", "queue_size",
    }  # fmt: skip
    assert (stats["save_count"], stats["queue_size"]) == (12, 0)
    for i in range(12):
        assert load_checkpoint(str(tmp_path / f"c{i}.pt"))["iteration"] == i
    with pytest.raises(StateError):
        saver.save_async(a_checkpoint(), str(tmp_path / "late.pt"))


def test_tensors_may_change_after_the_call_also_nested_and_shared_ones(tmp_path, monkeypatch):
    gate = threading.Event()
    real = torch.save
    monkeypatch.setattr(navrl.torch, "save", lambda *a: (gate.wait(120), real(*a)))
    weight = torch.ones(5, 6)
    state = {
        "deep": [{"exp_avg": (weight,)}],
        "view": weight[1:3].t(),
        "parameter": torch.nn.Parameter(weight.clone()),
        "bf16": torch.full((3,), 0.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "list": [1, 2],
    }
    saver = AsyncCheckpointSaver(verbose=False)
    saver.save_async(state, str(tmp_path / "c.pt"), compress=False)
    weight.zero_()
    state["list"].append(3)
    gate.set()
    saver.shutdown(timeout=300)
    loaded = load_checkpoint(str(tmp_path / "c.pt"))
    assert torch.equal(loaded["deep"][0]["exp_avg"][0], torch.ones(5, 6))
    assert torch.equal(loaded["view"], torch.ones(6, 2)) and loaded["list"] == [1, 2]
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["bf16"].dtype == torch.bfloat16 and loaded["empty"].shape == (0, 4)
    loaded["deep"][0]["exp_avg"][0][1, 0] = 9
    assert loaded["view"][0, 0] == 9, "what shared a storage no longer does"


def test_memory_is_used_again_without_mixing_saves(tmp_path):
    saver = AsyncCheckpointSaver(max_queue_size=1, verbose=False)
    for i in range(20):
        saver.save_async({"w": torch.full((1000,), i)}, str(tmp_path / f"{i}.pt"), compress=False)
    saver.shutdown(timeout=300)
    assert all((load_checkpoint(str(tmp_path / f"{i}.pt"))["w"] == i).all() for i in range(20))
    assert len(saver._snapshots._free) <= 3


def test_a_failed_save_is_raised_at_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    saver = AsyncCheckpointSaver(verbose=False)
    saver.save_async(a_checkpoint(), str(tmp_path / "file" / "c.pt"))
    with pytest.raises(StateError, match="was not saved"):
        saver.shutdown(timeout=300)


def test_compressing_without_lz4_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lz4.frame", None)
    saver = AsyncCheckpointSaver(verbose=False)
    with pytest.raises(MissingDependencyError, match="lz4"):
        saver.save_async(a_checkpoint(), str(tmp_path / "c.pt"))
    saver.shutdown(timeout=300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("level", [0, 3, 16])
def test_the_level_is_honoured(tmp_path, level):
    zeros = {"w": torch.arange(40_000, dtype=torch.int64) % 977}
    saver = AsyncCheckpointSaver(verbose=False, compression_level=level)
    saver.save_async(zeros, str(tmp_path / "c.pt"))
    saver.shutdown(timeout=300)
    buffer = io.BytesIO()
    torch.save(zeros, buffer)
    expected = lz4_frame.compress(buffer.getvalue(), compression_level=level, content_checksum=True)
    assert os.path.getsize(tmp_path / "c.pt.lz4") == len(expected)
    with pytest.raises(SchemaError):
        AsyncCheckpointSaver(verbose=False, compression_level=17)


def test_the_lines_and_the_statistics_block_are_printed(tmp_path, capsys):
    saver = AsyncCheckpointSaver()
    saver.save_async(a_checkpoint(), str(tmp_path / "c.pt"))
    saver.shutdown(timeout=300)
    load_checkpoint(str(tmp_path / "c.pt"))
    out = capsys.readouterr().out
    for line in ("Checkpoint queued for async save", "Checkpoint saved", "(compression:", "Total checkpoints: 1",
                 "overall compression", "Checkpoint loaded in"):  # fmt: skip
        assert line in out


@pytest.mark.parametrize("compress", [True, False])
def test_every_flipped_byte_is_found(tmp_path, compress):
    saver = AsyncCheckpointSaver(verbose=False)
    saver.save_async({"w": torch.arange(30.0)}, str(tmp_path / "c.pt"), compress=compress)
    saver.shutdown(timeout=300)
    file = tmp_path / ("c.pt.lz4" if compress else "c.pt")
    good, status = file.read_bytes(), file.stat()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        file.write_bytes(bad)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # rot leaves the time alone
        with pytest.raises(CorruptionError):
            load_checkpoint(str(tmp_path / "c.pt"))


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(NotFoundError, match="no checkpoint"):
        load_checkpoint(str(tmp_path / "nothing.pt"))
    save_the_old_way({"code": PerformanceMonitor()}, str(tmp_path / "code.pt"), compress=False)
    with pytest.raises(UnsupportedFormatError, match="weights_only=False"):
        load_checkpoint(str(tmp_path / "code.pt"))
    (tmp_path / "torn.pt.lz4").write_bytes(b"\x04\x22\x4d\x18torn")
    with pytest.raises(CorruptionError):
        load_checkpoint(str(tmp_path / "torn.pt"))


def test_small_helpers(tmp_path, capsys):
    assert format_checkpoint_name("/c", 1000, "reward", 123.45) == "/c/checkpoint_iter_1000_reward_123.45.pt"
    assert format_checkpoint_name("/c", 5) == "/c/checkpoint_iter_5.pt"
    model = torch.nn.Linear(10, 5)
    model.bias.requires_grad = False
    assert get_model_size(model) == {"total_params": 55, "trainable_params": 50, "size_mb": 220 / 2**20}
    print_model_info(model, "Actor")
    assert "=== Actor Info ===" in capsys.readouterr().out
