"""Windows against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.schema import Clock
from trajstore.sampling.windows import Window, WindowIndex, returns_of_n_steps, ticks

MAIN = Clock("main")


def by_hand(lengths: list[int], window: Window) -> list[tuple[int, list[int]]]:
    """Each window as its trajectory and its steps, out-of-range ones included."""
    found = []
    reach = (window.length - 1) * window.dilation
    for number, length in enumerate(lengths):
        if length < (window.dilation if window.before or window.after else 1):
            continue
        for start in range(-window.before, length - reach + window.after, window.stride):
            found.append((number, [start + i * window.dilation for i in range(window.length)]))
    return found


@pytest.mark.parametrize(
    ("length", "stride", "dilation", "pads"),
    list(itertools.product([1, 2, 5], [1, 3], [1, 2], [(0, 0), (1, 0), (0, 1), (99, 99)])),
)
def test_windows_are_those_that_a_loop_finds(length: int, stride: int, dilation: int, pads: tuple[int, int]) -> None:
    reach = (length - 1) * dilation
    window = Window(length, stride, dilation, min(pads[0], reach), min(pads[1], reach))
    lengths = [7, 0, 1, 12, 3, 30]
    index = WindowIndex(window, np.array(lengths))
    expected = by_hand(lengths, window)
    assert len(index) == len(expected)
    trajectory, anchors = index.locate(np.arange(len(index)))
    steps = window.steps("x", anchors)
    assert list(zip(trajectory.tolist(), steps.tolist())) == expected
    of = np.array(lengths)[trajectory]
    rows, real = ticks(MAIN, steps, of, of)
    assert (real == ((steps >= 0) & (steps < of[:, None]))).all()
    assert (rows == np.clip(steps, 0, of[:, None] - 1)).all()
    assert real.any(1).all(), "a window without a single real step"
    assert index.counts.sum() == len(index)


def test_offsets_give_each_field_its_own_horizon() -> None:
    window = Window(offsets={"obs": (-1, 0), "action": range(4)}, before=1, after=3)
    assert window.reach == (-1, 3)
    index = WindowIndex(window, np.array([5]))
    assert len(index) == 5  # every step is an anchor
    _, anchors = index.locate(np.arange(5))
    assert anchors.tolist() == [0, 1, 2, 3, 4]
    assert window.steps("obs", anchors)[0].tolist() == [-1, 0]
    assert window.steps("action", anchors)[4].tolist() == [4, 5, 6, 7]
    assert window.steps("other", anchors)[2].tolist() == [2]


def test_times_in_seconds() -> None:
    window = Window.of_seconds({"obs": [-0.2, 0.0], "action": [0.0, 0.1, 0.3]}, rate=10, pad="zero")
    assert window == Window(offsets={"obs": (-2, 0), "action": (0, 1, 3)}, before=2, after=3, pad="zero")
    assert WindowIndex(window, np.array([4, 1])).counts.tolist() == [4, 1]
    with pytest.raises(SchemaError, match="there are none for 'obs'"):
        Window.of_seconds({"obs": [-0.25]}, rate=10)


def test_rows_of_the_other_clocks() -> None:
    steps, six = np.array([[-1, 0, 5, 6, 7]]), np.array([6])
    rows, real = ticks(Clock("last_row_extra"), steps, six, six + 1)
    assert rows.tolist() == [[0, 0, 5, 6, 6]] and real.tolist() == [[False, True, True, True, False]]
    inside = np.array([[0, 2, 3, 5]])
    rows, _ = ticks(Clock("first_row_of_each_epoch_extra"), inside, six, six + 2)
    assert rows.tolist() == [[1, 3, 5, 7]]  # two epochs of three steps, each with a row before it
    rows, _ = ticks(Clock("first_row_of_each_epoch_extra"), inside, six, six)
    assert rows.tolist() == inside.tolist()
    rows, real = ticks(Clock("rate", 2), np.array([[5, 6]]), six, six * 2)
    assert rows.tolist() == [[10, 11, 10, 11]] and real.tolist() == [[True, True, False, False]]
    with pytest.raises(NotFoundError, match="does not say which of its rows"):
        ticks(Clock("none"), inside, six, six)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"length": 0}, {"stride": 0}, {"pad": "mirror"}, {"before": 1}, {"length": 3, "after": 3}),
        *({"length": 2.0}, {"length": "2"}, {"stride": 1.5}, {"dilation": None}, {"length": 3, "before": 0.5}),
        *({"offsets": {"a": deltas}} for deltas in ((), (-0.5, 0), (0, 1.0), "ab", 1.5, None)),
        {"offsets": [("a", (0,))]},
    ],
    ids=str,
)
def test_windows_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SchemaError):
        Window(**wrong)  # type: ignore[arg-type]


def test_a_sample_beyond_the_last_is_refused() -> None:
    with pytest.raises(NotFoundError, match="there are 3 samples"):
        WindowIndex(Window(), np.array([3])).locate(np.array([3]))


def test_n_step_returns_stop_at_the_end() -> None:
    rewards = np.array([[1, 2, 4], [1, 2, 4], [1, 2, 4]], np.float32)
    real = np.array([[True] * 3, [True] * 3, [True, True, False]])
    terminated = np.array([[False] * 3, [False, True, False], [False] * 3])
    sums, steps, factor = returns_of_n_steps(rewards, real, terminated, 0.5)
    assert sums.tolist() == [1 + 1 + 1, 1 + 1, 1 + 1] and sums.dtype == np.float32
    assert steps.tolist() == [3, 2, 2]
    assert factor.tolist() == [0.125, 0.0, 0.25]
