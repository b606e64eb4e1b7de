"""The replay buffer's tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from trajstore.torch import Priorities, ReplayBuffer, Transitions  # noqa: E402


def test_batches_are_nested_tensors(tmp_path: Path) -> None:
    with ReplayBuffer(
        tmp_path / "s",
        Transitions(("obs/x",)),
        priorities=Priorities(),
        fresh="memory",
        commit_every=None,
        device="cpu",
    ) as buffer:
        for number in range(2):
            buffer.add(
                {
                    "obs": {"x": torch.full((5, 2), number, dtype=torch.bfloat16) + 0.5},
                    "action": torch.arange(4),
                    "reward": torch.ones(4),
                    "terminated": torch.tensor([False] * 3 + [True]),
                }
            )
            if number == 0:
                buffer.commit()
        batch = buffer.sample(40)
        assert batch["obs"]["x"].dtype == batch["next"]["obs"]["x"].dtype == torch.bfloat16
        assert set(batch["obs"]["x"][:, 0].tolist()) == {0.5, 1.5}
        assert batch["weight"].dtype == torch.float32 and batch["reward"].sum() == 40
        assert (batch["discount"] == torch.where(batch["terminated"], 0, 0.99)).all()
        buffer.update_priorities(batch["index"], torch.rand(40, requires_grad=True))


def test_tensordict_on_request(tmp_path: Path) -> None:
    tensordict = pytest.importorskip("tensordict")
    with ReplayBuffer(tmp_path / "s", fresh="memory", tensordict=True, commit_every=None) as buffer:
        buffer.add({"obs": {"x": np.zeros((3, 2))}, "action": np.arange(3)})
        batch = buffer.sample(7)
        assert isinstance(batch, tensordict.TensorDict) and batch["obs", "x"].shape == (7, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_batches_go_to_the_device(tmp_path: Path) -> None:
    with ReplayBuffer(tmp_path / "s", fresh="memory", device="cuda", pin_memory=True, prefetch=2) as buffer:
        buffer.add({"x": torch.arange(6.0, device="cuda"), "action": torch.arange(6, device="cuda")})
        batch = buffer.sample(32)
        assert batch["x"].is_cuda and (batch["x"].long() == batch["action"]).all()
        buffer.commit()
        assert buffer.sample(32)["x"].is_cuda
