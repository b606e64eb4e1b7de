"""What a checkpoint holds comes back as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sameness import same
from trajstore.checkpoint import Checkpoints, File, read_folder, write_folder
from trajstore.checkpoint.tree import Flattening, Unflattening
from trajstore.errors import NotFoundError, SchemaError


@pytest.fixture
def ckpts(tmp_path):
    with Checkpoints(tmp_path / "ckpts", keep_last=None) as checkpoints:
        yield checkpoints


def round_trip(checkpoints, state):
    checkpoints.save(len(checkpoints.list()), state)
    return checkpoints.restore().state


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=50)
    | st.complex_numbers(allow_nan=False) | st.sampled_from([np.float32(1.5), np.int8(-3), np.bool_(True)])
)  # fmt: skip
keys = st.text(max_size=8) | st.integers(-5, 5) | st.tuples(st.integers(0, 3), st.text(max_size=2))
arrays = st.sampled_from(
    [np.arange(6.0).reshape(2, 3), np.zeros((0, 4), np.int16), np.array(3, np.uint8), np.array([True, False]),
     np.asfortranarray(np.arange(12).reshape(3, 4)), np.array(["ä", "bc"]), np.array([1 + 2j], np.complex64),
     np.array(["2020-01-01"], "M8[s]"), np.zeros(2, [("a", "i4"), ("b", "f8", (2,))]), np.arange(3, dtype=">i4")]
)  # fmt: skip
trees = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner, max_size=3).map(OrderedDict),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(trees)
def test_any_nesting_comes_back_from_its_structure(state):
    flat = Flattening(state)
    extents = flat.finish()
    data = [np.frombuffer(e.source, np.uint8) if isinstance(e.source, bytes)
            else e.source.reshape(-1).view(np.uint8) if e.source.size else np.empty(0, np.uint8)
            for e in extents]  # fmt: skip
    from trajstore.format import typedjson

    node = typedjson.loads(typedjson.dumps(flat.node))
    assert same(Unflattening([e.start for e in extents], lambda i: data[i].copy()).build(node), state)


def test_any_nesting_comes_back_from_disk(ckpts):
    state = {
        "ints": {0: "a", 1: [1, (2, None)], (3, "x"): {"deep": np.arange(5)}},
        "floats": [float("nan"), float("-inf"), 0.1, -0.0],
        "strings": ["", "ünï", "\ud800"],
        "bytes": b"\x00\xff" * 100,
        "ordered": OrderedDict(z=1, a=2),
        "set": {1, 2},
        "big": 2**200,
        "numpy": np.float16(0.3),
        "array": np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2],
        "strange section/name": np.ones(3),
        "Array": np.ones(2),
    }
    back = round_trip(ckpts, state)
    assert same(back.pop("array"), np.ascontiguousarray(state.pop("array")))
    assert same(back, state)
    assert same(round_trip(ckpts, [1, np.arange(3)]), [1, np.arange(3)])


def test_arrays_larger_than_a_chunk(ckpts):
    array = np.random.default_rng(0).standard_normal(3_000_001)
    assert np.array_equal(round_trip(ckpts, {"a": array})["a"], array)


def test_files_and_folders_travel_unopened(ckpts, tmp_path):
    source = tmp_path / "rllib"
    (source / "policies" / "seeker").mkdir(parents=True)
    (source / "algorithm_state.pkl").write_bytes(b"\x80\x04not really a pickle")
    (source / "policies" / "seeker" / "policy_state.pkl").write_bytes(b"x" * 100_000)
    back = round_trip(ckpts, {"rllib": read_folder(source), "module": File(source / "algorithm_state.pkl")})
    assert back["module"] == b"\x80\x04not really a pickle" and back["module"].name == "algorithm_state.pkl"
    write_folder(back["rllib"], tmp_path / "out")
    assert (tmp_path / "out/policies/seeker/policy_state.pkl").read_bytes() == b"x" * 100_000
    with pytest.raises(NotFoundError, match="cannot be read"):
        ckpts.save(9, {"f": File(tmp_path / "nothing")})


def test_what_a_checkpoint_does_not_hold_is_refused_by_its_path(ckpts):
    class Thing:
        pass

    for state, place in [
        ({"a": {"b": [Thing()]}}, r"\$\.a\.b\[0\]"),
        ({"a": np.array([None])}, "Python objects"),
        ({"a": defaultdict(int)}, "dict"),
        ({"a": lambda: 0}, r"\$\.a"),
        ({"a": {Thing(): 1}}, "key"),
    ]:
        with pytest.raises(SchemaError, match=place):
            ckpts.save(1, state)
    loop: list = []
    loop.append(loop)
    with pytest.raises(SchemaError, match="contains itself"):
        ckpts.save(1, {"loop": loop})
    assert ckpts.save(1, {"fine": 1})  # a refused state leaves the arenas free


def test_the_same_array_twice_is_the_same_array_again(ckpts):
    array = np.arange(5)
    back = round_trip(ckpts, {"a": array, "b": [array]})
    assert back["a"] is back["b"][0]


def test_random_numbers_go_on_where_they_were(tmp_path):
    with Checkpoints(tmp_path / "c") as ckpts:
        random.seed(3)
        np.random.seed(3)
        random.gauss(0, 1)
        np.random.standard_normal()  # leave a cached second value in both
        ckpts.save(1, {})
        expected = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]
        ckpts.restore(into={})
        assert [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()] == expected
        ckpts.restore(into={}, rng=False)
        assert random.random() != expected[0]


def test_a_generator_of_ones_own_is_a_plain_dict(ckpts):
    generator = np.random.default_rng(5)
    back = round_trip(ckpts, {"generator": generator.bit_generator.state})
    expected = generator.random(4)
    other = np.random.default_rng(0)
    other.bit_generator.state = back["generator"]
    assert np.array_equal(other.random(4), expected)


def test_parts_are_loaded_alone(ckpts):
    ckpts.save(5, {"model": {"w": np.arange(4.0), "deep": [np.zeros(2), {"k": 7}]}, "other": np.ones(2)})
    assert np.array_equal(ckpts.load(5, "model/w"), np.arange(4.0))
    assert ckpts.load(None, ("model", "deep", 1, "k")) == 7
    assert set(ckpts.load(5, "model")) == {"w", "deep"}
    for bad in ("model/nothing", "nothing", "model/deep/7", "model/w/x"):
        with pytest.raises(NotFoundError, match="has no"):
            ckpts.load(5, bad)


def test_into_is_filled_in_place_or_not_touched_at_all(ckpts):
    ckpts.save(1, {"a": np.arange(3.0), "b": {"c": [np.ones(2), 5]}, "n": 7, "extra": 1})
    a, c = np.zeros(3), np.zeros(2)
    into = {"a": a, "b": {"c": [c, 0]}, "n": 0}
    ckpts.restore(into)
    assert a.tolist() == [0, 1, 2] and c.tolist() == [1, 1] and into["b"]["c"][1] == 5 and into["n"] == 7
    untouched = np.zeros(3)
    for bad in ({"a": untouched, "b": {"c": [np.zeros(3), 0]}}, {"a": untouched, "b": {"c": [c.astype("f4"), 0]}},
                {"a": untouched, "zz": 0}):  # fmt: skip
        with pytest.raises((SchemaError, NotFoundError)):
            ckpts.restore(bad)
    assert untouched.tolist() == [0, 0, 0]
