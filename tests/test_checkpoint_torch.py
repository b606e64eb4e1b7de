"""Torch states: bits, views, shared storages, optimizers, and a run that goes on as if nothing had happened."""

from __future__ import annotations

import copy
import random
import signal
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from trajstore.checkpoint import Checkpoints, File  # noqa: E402
from trajstore.checkpoint.freezing import Owned  # noqa: E402
from trajstore.checkpoint.staging import Staging  # noqa: E402
from trajstore.errors import NotFoundError, SchemaError, StateError  # noqa: E402


@pytest.fixture
def ckpts(tmp_path):
    with Checkpoints(tmp_path / "ckpts", keep_last=None) as checkpoints:
        yield checkpoints


def round_trip(checkpoints, state):
    checkpoints.save(len(checkpoints.list()), state)
    return checkpoints.restore().state


def bits(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.flatten().view(torch.uint8).numpy())


NAMES = """bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex32 complex64
complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = [getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(ckpts, dtype):
    raw = torch.arange(1, 1 + 48 * 16, dtype=torch.int64).to(torch.uint8)
    if dtype == torch.bool:
        raw = raw & 1
    tensor = raw.view(dtype).reshape(3, -1) if dtype != torch.bool else raw.bool().reshape(3, -1)
    back = round_trip(ckpts, {"model": {"t": tensor, "zero_d": tensor[0, 0], "empty": tensor[:0]}})["model"]
    assert bits(back["t"]) == bits(tensor)
    assert bits(back["zero_d"]) == bits(tensor[0, 0]) and back["empty"].shape == tensor[:0].shape


def test_views_share_again_and_nothing_else_travels(ckpts):
    base = torch.arange(1_000_000.0)
    window = base[500:700]
    state = {
        "a": window.view(10, 20), "b": window.view(10, 20).t(), "c": window[::3], "d": window[5],
        "expanded": window[:4].unsqueeze(0).expand(3, 4), "raw": window.view(torch.int32), "alone": torch.ones(3),
    }  # fmt: skip
    back = round_trip(ckpts, {"state": state})["state"]
    for key, tensor in state.items():
        assert bits(back[key]) == bits(tensor) and back[key].stride() == tensor.stride()
    back["a"][0, 0] = -1.0
    assert back["b"][0, 0] == back["c"][0] == back["expanded"][2, 0] == -1.0
    assert back["alone"].untyped_storage().nbytes() == 12
    assert ckpts.latest().raw_bytes < 20_000, "the whole of a view's base was saved"


def test_a_storage_seen_through_dtypes_of_other_widths(ckpts):
    storage = torch.arange(7, dtype=torch.uint8)
    state = {"wide": storage[:4].view(torch.int32), "all": storage, "odd": storage[5:7].view(torch.int8)}
    back = round_trip(ckpts, state)
    assert all(bits(back[key]) == bits(tensor) for key, tensor in state.items())
    back["all"][0] = 9
    assert back["wide"][0] & 255 == 9


def test_sharing_across_sections(ckpts):
    tied = torch.nn.Linear(3, 3)
    back = round_trip(ckpts, {"model": {"w": tied.weight.data}, "target": {"w": tied.weight.data}})
    back["model"]["w"].zero_()
    assert not back["target"]["w"].any()


def test_lazy_bits_are_materialised(ckpts):
    z = torch.tensor([1 + 2j, 3 - 4j])
    back = round_trip(ckpts, {"conj": z.conj(), "imag": z.conj().imag})
    assert torch.equal(back["conj"], z.conj()) and torch.equal(back["imag"], z.conj().imag)


def test_parameters_stay_parameters(ckpts):
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad = False
    back = round_trip(ckpts, {"p": dict(module.named_parameters()), "leaf": torch.ones(2, requires_grad=True)})
    assert type(back["p"]["weight"]) is torch.nn.Parameter and back["p"]["weight"].requires_grad
    assert not back["p"]["bias"].requires_grad and back["leaf"].requires_grad


def test_state_dicts_come_back_exactly(ckpts):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    expected = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    back = round_trip(ckpts, {"model": model, "optimizer": optimizer, "scheduler": scheduler})

    def same(left, right):
        assert type(left) is type(right)
        if isinstance(left, dict):
            assert list(left) == list(right)
            for key in left:
                same(left[key], right[key])
        elif isinstance(left, list):
            for pair in zip(left, right, strict=True):
                same(*pair)
        elif isinstance(left, torch.Tensor):
            assert bits(left) == bits(right) and left.stride() == right.stride()
        else:
            assert left == right

    same(back, expected)
    assert back["model"]._metadata == expected["model"]._metadata
    assert set(back["optimizer"]["state"]) == {0, 1, 2, 3}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support", "ignore::DeprecationWarning", "ignore:.*quantize_per_tensor"
)
def test_what_has_no_plain_bytes_is_refused(ckpts):
    for tensor, word in [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.eye(3).to_sparse_csr(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    ]:
        with pytest.raises(SchemaError, match=word):
            ckpts.save(1, {"model": {"t": tensor}})


def test_restored_tensors_do_not_drag_the_checkpoint_along(ckpts):
    back = round_trip(ckpts, {"model": {f"w{i}": torch.randn(1000) for i in range(50)}})
    assert back["model"]["w7"].untyped_storage().nbytes() == 4000


class Run:
    """A small run with all that must survive: dropout, batch norm, Adam, a schedule, random data, a target."""

    def __init__(self):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.3),
            torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3),
        )  # fmt: skip
        self.target = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.step = 0

    def parts(self):
        return {"model": self.model, "target": self.target, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.from_numpy(np.random.rand(8, 1, 8, 8).astype("f4")) * random.random()
            loss = (self.model(x) - self.target(x).detach()).pow(2).mean() + self.model(x).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            if self.step % 4 == 0:
                self.target.load_state_dict(self.model.state_dict())
            self.step += 1
            losses.append(loss.item())
        return losses

    def bits(self):
        tensors = [*self.model.state_dict().values(), *self.target.state_dict().values()]
        tensors += [v for s in self.optimizer.state_dict()["state"].values() for v in s.values()]
        return [bits(tensor) for tensor in tensors]


@pytest.mark.parametrize("lazily", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, lazily):
    whole = Run()
    losses = whole.train(20)

    first = Run()
    with Checkpoints(tmp_path / "c") as ckpts:
        if lazily:
            ckpts.stage_lazily(first.optimizer)
        first_losses = []
        for _ in range(11):
            first_losses += first.train(1)
            ckpts.save(first.step, first.parts() | {"step": first.step})
        ckpts.wait()
        first.train(3)  # what comes after the save is lost

    second = Run()
    torch.manual_seed(99)
    with Checkpoints(tmp_path / "c") as ckpts:
        restored = ckpts.restore(into=second.parts())
        second.step = restored.state["step"]
        assert restored.step == second.step == 11
        assert first_losses + second.train(9) == losses
    assert second.bits() == whole.bits()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("foreach", [False, True])
def test_lazy_staging_saves_what_was_there_at_the_call(tmp_path, optimizer_class, foreach):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 10))
    options = {"momentum": 0.9} if optimizer_class is not torch.optim.Adam else {}
    optimizer = optimizer_class(model.parameters(), lr=0.1, foreach=foreach, **options)
    expected = {}
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        ckpts.stage_lazily(optimizer)
        for step in range(25):
            optimizer.zero_grad()
            model(torch.randn(4, 300)).pow(2).sum().backward()
            optimizer.step()
            ckpts.save(step, {"model": model, "optimizer": optimizer})
            expected[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model(torch.randn(4, 300))  # moves the running statistics, which no optimizer owns
        ckpts.wait()
        for step, (weights, moments) in expected.items():
            back = ckpts.restore(step=step).state
            for key, value in weights.items():
                assert bits(back["model"][key]) == bits(value), (step, key)
            for index, values in moments["state"].items():
                for key, value in values.items():
                    assert not isinstance(value, torch.Tensor) or bits(back["optimizer"]["state"][index][key]) == bits(
                        value
                    )


def test_lazy_staging_copies_at_once_what_no_optimizer_owns(tmp_path, monkeypatch):
    gate, copy_later = threading.Event(), Staging.finish
    monkeypatch.setattr(Staging, "finish", lambda self: (gate.wait(120), copy_later(self)))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    base, array, values, z = torch.arange(1000.0), np.arange(6.0), [1, {"k": (2, 3)}], torch.tensor([1 + 2j, 3 - 4j])
    large = torch.zeros(600_000)
    state = {
        "model": model, "optimizer": optimizer, "target": copy.deepcopy(model).state_dict(), "values": values,
        "views": {"a": base[10:30].view(4, 5), "b": base[10:30].view(5, 4).t(), "bits": base[10:12].view(torch.int32)},
        "kinds": [torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(5), z.conj(), large, large[:5]],
        "leaf": {"p": torch.nn.Parameter(torch.ones(2)), "g": torch.ones(2, requires_grad=True)},
        "arrays": {"one": array, "again": array, "size": torch.Size([1, 2]), "scalar": np.float32(0.5)},
    }  # fmt: skip
    with Checkpoints(tmp_path / "whole") as ckpts:
        gate.set()
        ckpts.save(1, state)
        expected = ckpts.restore().state
    gate.clear()
    with Checkpoints(tmp_path / "lazy") as ckpts:
        ckpts.stage_lazily(optimizer)
        ckpts.save(1, state)
        with torch.no_grad():
            for changed in (base, large, z, *state["target"].values(), *model.buffers(), *state["leaf"].values()):
                changed.zero_()
        array[:] = 0
        values[1]["k"] = None
        optimizer.param_groups[0]["lr"] = 7.0
        gate.set()
        found = ckpts.restore().state

    def same(left, right):
        assert type(left) is type(right)
        if isinstance(left, dict):
            assert list(left) == list(right)
            for key in left:
                same(left[key], right[key])
        elif isinstance(left, (list, tuple)):
            for pair in zip(left, right, strict=True):
                same(*pair)
        elif isinstance(left, torch.Tensor):
            assert bits(left) == bits(right) and left.stride() == right.stride()
            assert left.requires_grad == right.requires_grad
        else:
            assert np.array_equal(left, right)

    same(found, expected)
    assert found["model"]._metadata == expected["model"]._metadata and found["optimizer"]["param_groups"][0]["lr"] < 1
    found["views"]["a"][0, 0] = -1.0
    assert found["views"]["b"][0, 0] == -1.0, "what shared a storage no longer does"
    assert found["arrays"]["one"] is found["arrays"]["again"]


def test_what_comes_to_lie_where_a_parameter_lay_is_not_taken_for_it():
    model = torch.nn.Linear(50, 50)
    owned = Owned(list(model.parameters()))
    assert owned and owned.still()
    model.weight.data = model.weight.data.clone()
    assert not owned.still()
    again = Owned([*model.parameters(), torch.empty(0), torch.empty(3, device="meta")])
    assert again.still() and 0 not in again.starts
    assert id(model.weight) in again.ids and model.weight.data_ptr() in again.starts


def test_what_cannot_be_frozen_is_copied_or_refused_at_once(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (tmp_path / "file").write_bytes(b"bytes")
    cycle = []
    cycle.append(cycle)
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.stage_lazily(optimizer)
        for bad, word in (
            (print, r"\$\.deep\.bad is a builtins"),
            (torch.eye(2).to_sparse(), "sparse"),
            (cycle, "itself"),
        ):
            with pytest.raises(SchemaError, match=word):
                ckpts.save(1, {"model": model, "deep": {"bad": bad}})
        ckpts.save(1, {"model": model, "set": {1, 2}, "file": File(tmp_path / "file"), "keys": {(1, 2): 3, None: 4}})
        (tmp_path / "file").write_bytes(b"other")
        back = ckpts.restore().state
        assert back["set"] == {1, 2} and back["file"] == b"bytes" and back["keys"] == {(1, 2): 3, None: 4}


def test_a_change_behind_the_optimizers_back_is_noticed(tmp_path, monkeypatch):
    gate, copy_later = threading.Event(), Staging.finish
    monkeypatch.setattr(Staging, "finish", lambda self: (gate.wait(120), copy_later(self)))
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ckpts = Checkpoints(tmp_path / "c")
    ckpts.stage_lazily(optimizer)
    assert ckpts.save(1, {"model": model})
    with torch.no_grad():
        model.weight.add_(1)  # neither of the threads that copy has passed the gate
    gate.set()
    with pytest.raises(StateError, match="changed in place"):
        ckpts.wait()
    ckpts.save(2, {"model": model})
    ckpts.close()
    assert [c.step for c in ckpts.list()] == [2]


def test_into_modules_and_optimizers(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(3, {"model": model, "optimizer": optimizer, "tensor": torch.ones(2), "epoch": 4})
        other = torch.nn.Linear(3, 3)
        other_optimizer = torch.optim.Adam(other.parameters())
        into = {"model": other, "optimizer": other_optimizer, "tensor": torch.zeros(2), "epoch": 0}
        ckpts.restore(into)
        assert bits(other.weight) == bits(model.weight) and into["tensor"].sum() == 2 and into["epoch"] == 4
        assert other_optimizer.state_dict()["state"][0]["step"] == 1
        with pytest.raises(StateError, match=r"does not fit[\s\S]*torch"):
            ckpts.restore({"model": torch.nn.Linear(5, 5)})
        with pytest.raises(NotFoundError, match="it has model"):
            ckpts.restore({"critic": other})


def test_torch_generators_are_part_of_it(tmp_path):
    with Checkpoints(tmp_path / "c") as ckpts:
        torch.manual_seed(5)
        torch.randn(3)
        ckpts.save(0, {})
        expected = torch.randn(4)
        ckpts.restore(into={})
        assert torch.equal(torch.randn(4), expected)


def test_cuda_tensors(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = torch.nn.Linear(2000, 2000, device="cuda")
    optimizer = torch.optim.Adam(model.parameters())
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        ckpts.stage_lazily(optimizer)
        expected = {}
        for step in range(10):
            model(torch.randn(8, 2000, device="cuda")).sum().backward()
            optimizer.step()
            ckpts.save(step, {"model": model, "optimizer": optimizer})
            expected[step] = model.weight.detach().cpu().clone()
        ckpts.wait()
        for step, weight in expected.items():
            assert torch.equal(ckpts.load(step, "model/weight"), weight)


def test_a_signal_in_the_middle_of_a_lazy_copy_waits_for_it(tmp_path, monkeypatch):
    """The handler waits for what is being saved, so it must not stand on the copy that it cut off."""
    seen, copied, finish, copy_now = [], threading.Event(), Staging.finish, Staging._copy

    def finish_in_the_loop_first(self):
        if threading.current_thread() is threading.main_thread():
            finish(self)
            copied.set()
        elif copied.wait(120):
            finish(self)

    def copy_with_a_signal_in_the_middle(self, frozen):
        signal.raise_signal(signal.SIGTERM)
        seen.append("copied")
        copy_now(self, frozen)

    before = signal.signal(signal.SIGTERM, lambda *_: seen.append([c.step for c in ckpts.list()]))
    try:
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monkeypatch.setattr(Staging, "finish", finish_in_the_loop_first)
        with Checkpoints(tmp_path / "c") as ckpts:
            ckpts.stage_lazily(optimizer)
            ckpts.save(1, {"model": model})
            monkeypatch.setattr(Staging, "_copy", copy_with_a_signal_in_the_middle)
            optimizer.step()
            assert seen == ["copied", [1]]
            monkeypatch.setattr(Staging, "_copy", copy_now)
    finally:
        signal.signal(signal.SIGTERM, before)
