"""Errors are caught as what a careful caller expects, and say where and what next."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value)]


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not errors.ConfigMismatchError])
def test_an_error_reads_as_message_and_hint(kind: type[errors.TrajstoreError]) -> None:
    error = kind("there is none at 'x'", hint="make one")
    assert str(error) == "there is none at 'x' (make one)" and str(kind("no hint")) == "no hint"
    assert isinstance(error, errors.TrajstoreError)
    assert error.message in str(pickle.loads(pickle.dumps(error)))


def test_what_is_not_there_fails_as_in_a_mapping_and_a_sequence(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        writer.append({"inner": {"x": np.arange(3)}}, seed=1)
    dataset = trajstore.open(tmp_path / "s")
    for mapping in (dataset.table, dataset.steps, dataset[0], dataset[0]["inner"]):
        assert "nothing" not in mapping and mapping.get("nothing") is None
        with pytest.raises(KeyError):
            mapping["nothing"]
    for sequence in (dataset, dataset[0]["inner/x"]):
        with pytest.raises(IndexError):
            sequence[3]
    with pytest.raises(LookupError):
        trajstore.open(tmp_path / "nothing")
