"""Defects that a reading of the core found, each as a user met it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.errors import SchemaError
from trajstore.schema import Field

ACTION = np.zeros(2, np.float32)


def writer(path: Path, **options: object) -> trajstore.Writer:
    return trajstore.create(path, commit_every=None, handle_signals=False, **options)  # type: ignore[arg-type]


def test_a_list_of_numbers_keeps_its_values_in_a_bfloat16_field(tmp_path: Path) -> None:
    with writer(tmp_path / "run", fields={"h": Field("bfloat16")}) as store:
        store.append({"action": ACTION, "h": [1.0, -2.5]})
        store.append({"action": ACTION, "h": [3, float("nan")]})
        with pytest.raises(SchemaError, match="bfloat16 cannot hold"):
            store.append({"action": ACTION, "h": [1.0, 1.001]})
    dataset = trajstore.open(tmp_path / "run")
    np.testing.assert_array_equal(dataset[0]["h"][:], np.array([1.0, -2.5], np.float32))
    np.testing.assert_array_equal(dataset[1]["h"][:], np.array([3, np.nan], np.float32))


def test_a_list_may_hold_what_is_not_a_number(tmp_path: Path) -> None:
    with writer(tmp_path / "run", fields={"r": Field("float32"), "n": Field("int32")}) as store:
        store.append({"action": ACTION, "r": [1.0, float("nan")], "n": [1.0, 2.0]})
        with pytest.raises(SchemaError, match="int32 cannot hold"):
            store.append({"action": ACTION, "r": [1.0, 2.0], "n": [1.0, float("nan")]})
    np.testing.assert_array_equal(trajstore.open(tmp_path / "run")[0]["r"][:], np.array([1, np.nan], np.float32))


def test_a_batch_of_bfloat16_is_not_taken_for_integers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with writer(tmp_path / "run", fields={"h": Field("uint16")}) as store:
        with pytest.raises(SchemaError, match="has the dtype bfloat16, expected uint16"):
            store.append_many({"action": ACTION, "h": torch.ones(2, dtype=torch.bfloat16)}, lengths=[2])
