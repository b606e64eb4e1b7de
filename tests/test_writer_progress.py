"""The caller's own state and target: what cannot be stored is refused where it is given, and costs nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import SchemaError, StateError

STEPS = {"x": np.arange(3)}


def stored(path: Path) -> dict[str, Any]:
    with trajstore.create(path, resume=True) as writer:
        return dict(writer.state)


@pytest.mark.parametrize(
    "give",
    [
        lambda writer, bad: writer.state.__setitem__("odd", bad),
        lambda writer, bad: writer.state.update({"odd": bad}),
        lambda writer, bad: writer.state.update(odd=bad),
        lambda writer, bad: writer.state.setdefault("odd", bad),
        lambda writer, bad: writer.state.__ior__({"odd": bad}),
        lambda writer, bad: setattr(writer, "state", {"odd": bad}),
    ],
)
def test_what_json_cannot_hold_is_refused_where_it_is_given(
    tmp_path: Path, give: Callable[[trajstore.Writer, Any], None]
) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        writer.state["kept"] = {"n": 1}
        for bad in (object(), {"deep": [1, object()]}):
            with pytest.raises(SchemaError, match=r"the writer's state cannot be stored: \$\.odd.* is a "):
                give(writer, bad)
        writer.append(STEPS)
        writer.commit()
        writer.state.setdefault("kept", object())  # it is there, and stays as it is
    assert stored(tmp_path / "s") == {"kept": {"n": 1}}
    assert len(trajstore.open(tmp_path / "s")) == 1


def test_what_is_put_into_a_value_later_keeps_no_trajectory_from_being_stored(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with trajstore.create(path, commit_every=None) as writer:
        writer.state["counters"] = {"good": 1}
        writer.append(STEPS)
        writer.commit()
        writer.state["counters"]["bad"] = object()
        writer.append(STEPS)
        for _ in range(2):
            with pytest.raises(SchemaError, match=r"\$\.counters\.bad"):
                writer.commit()
        assert len(trajstore.open(path)) == writer.committed == 2
        assert trajstore.open(path).snapshots[0].manifest.progress["state"] == {"counters": {"good": 1}}
        writer.state["counters"]["bad"] = 2
        writer.commit()
    assert stored(path) == {"counters": {"good": 1, "bad": 2}}


def test_the_last_commit_tells_of_the_state_too(tmp_path: Path) -> None:
    writer = trajstore.create(tmp_path / "s", commit_every=None)
    writer.state["counters"] = {}
    writer.append(STEPS)
    writer.state["counters"]["bad"] = object()
    with pytest.raises(SchemaError, match=r"counters\.bad"):
        writer.close()
    assert len(trajstore.open(tmp_path / "s")) == 1
    trajstore.create(tmp_path / "s", resume=True).close()  # it was released


def test_a_state_that_another_thread_changes_is_stored(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None, handle_signals=False) as writer:
        writer.state["counts"] = {}
        stop = threading.Event()

        def count() -> None:
            number = 0
            while not stop.is_set():
                writer.state["counts"][str(number % 512)] = number
                writer.state[str(number % 64)] = number
                number += 1
                if number % 512 == 0:
                    writer.state["counts"].clear()

        thread = threading.Thread(target=count)
        thread.start()
        try:
            for _ in range(20):
                writer.append(STEPS)
                writer.commit()
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("target", [np.int64(7), 7])
def test_a_target_is_a_number(tmp_path: Path, target: Any) -> None:
    with trajstore.create(tmp_path / "s", target=target) as writer:
        assert writer.remaining == 7
        for wrong in ("7", 7.5, [7]):
            with pytest.raises(SchemaError, match="a target is a number"):
                writer.target = wrong  # type: ignore[assignment]
        writer.target = np.int32(9)  # type: ignore[assignment]
    with trajstore.create(tmp_path / "s", resume=True) as writer:
        assert writer.target == 9
    with pytest.raises(StateError, match="closed"):
        writer.target = 10
    with pytest.raises(StateError, match="closed"):
        writer.state = {}
