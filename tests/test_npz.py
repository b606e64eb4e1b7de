"""``trajstore.npz``: reads what NumPy wrote, writes what NumPy reads, runs nothing and holds little."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sameness import objects, same
from trajstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    NotFoundError,
    SchemaError,
    StateError,
    StorageError,
)
from trajstore.media.storage import LocalStorage
from trajstore.npz import NpzReader, NpzWriter

DATA = Path(__file__).parent / "data"
BOXED = DATA / "coinrun_ckpt" / "shards" / "shard_000001.npz"


def ragged(n: int, rows: int = 5) -> list[np.ndarray[Any, Any]]:
    return [np.arange((i % rows) * 3, dtype=np.float32).reshape(-1, 3) for i in range(n)]


def episode(n: int) -> dict[str, Any]:
    return {"obs": np.full((n, 2), n, np.float16), "len": n, "return": np.float32(n), "success": np.bool_(n > 1)}


COLUMNS: dict[str, list[Any]] = {
    "arrays": ragged(7),
    "one array": ragged(3)[2:],
    "a thousand": ragged(1000),
    "a thousand and one": ragged(1001),
    "two thousand and two": ragged(2002),
    "dicts": [{"a": (1, 2.5), 3: None}, {}, {"b": {"c": [np.int8(1)]}}, {}],
    "dicts of one": [{"a": i} for i in range(5)],
    "episodes": [[episode(2), episode(1)], [], [], [episode(3)], [episode(1)], [], [episode(2)] * 2],
    "numbers": [1, 2.5, True, None, 300, -1, 1 << 80, "x", b"y"],
    "floats": [0.5] * 1500,
    "tuples": [(1, 2), (3,), (), (4, 5, 6, 7)],
    "nested": [[[]], [[[]]], [], {"a": []}, {"a": {}}],
    "others": [{1, 2}, frozenset("a"), 1 + 2j, bytearray(b"ab"), OrderedDict(b=1, a=2), np.str_("é"), np.float64(2)],
    "strings": ["é" * 300, "", "\ud800"],
    "odd arrays": [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::2],
        np.zeros((0, 2), np.float32),
        np.array(5, np.int16),
        np.array(["a", "bc"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.array([1 + 2j, 3]),
        np.array([True, False]),
        objects([None, {}]),
    ],
    "nothing": [],
}


class Odd:
    pass


def write(path: Path, **columns: list[Any]) -> Path:
    with NpzWriter(path, overwrite=True) as out:
        for name, values in columns.items():
            out.objects(name, len(values), values)
    return path


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_elements_of_any_pickle_come_one_by_one(name: str, protocol: int, tmp_path: Path) -> None:
    column = objects(COLUMNS[name])
    path = tmp_path / "a.npz"
    save_with_protocol(path, column, protocol)
    with NpzReader(path) as reader:
        assert same(list(reader.iterate("a")), list(np.load(path, allow_pickle=True)["a"]))
        assert same(reader.read("a"), np.load(path, allow_pickle=True)["a"])


def save_with_protocol(path: Path, array: Any, protocol: int, name: str = "a") -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": array.shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.npy", head.getvalue() + pickle.dumps(array, protocol))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f2", ">i4", "?", "<c16", "<U3", "<M8[s]"])
def test_plain_arrays(save: Any, dtype: str, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    save(tmp_path / "a.npz", a=array, f=np.asfortranarray(array), empty=array[:0], one=array[0, 0, 0])
    with NpzReader(tmp_path / "a.npz") as reader:
        for name, expected in np.load(tmp_path / "a.npz").items():
            assert same(reader.read(name), expected)
        assert reader.member("f").shape == (2, 3, 4) and reader.member("a").dtype == np.dtype(dtype)
        assert same(list(reader.iterate("a")), list(array))
        assert same(list(reader.iterate("f")), list(array))
        assert list(reader.iterate("empty")) == []


def test_a_real_file_under_every_name() -> None:
    path = DATA / "coinrun_routes.npz"
    expected = np.load(path, allow_pickle=True)
    with NpzReader(path) as reader:
        assert reader.names == expected.files
        assert reader.member("routes_obs").shape == (8,) and "nope" not in reader
        for name in expected.files:
            got = reader.read(name)
            assert same(got, expected[name]) if got.shape else got.item() == expected[name].item()
        reader.check()


def test_keys_are_iterated_side_by_side() -> None:
    with NpzReader(DATA / "coinrun_routes.npz") as reader:
        for obs, actions in zip(reader.iterate("routes_obs"), reader.iterate("routes_actions")):
            assert len(obs) == len(actions)


def test_boxed_rows_come_back_native() -> None:
    expected = np.load(BOXED, allow_pickle=True)
    assert type(expected["routes_obs"].flat[0]) is float  # the trap
    with NpzReader(BOXED) as reader:
        for name, dtype in [
            ("routes_obs", "f2"),
            ("routes_actions", "i8"),
            ("routes_xy", "f4"),
            ("routes_ents_count", "i4"),
        ]:
            (row,) = reader.iterate(name, dtype=dtype)
            assert row.dtype == np.dtype(dtype)
            assert same(row, expected[name][0].astype(dtype))


BOXES = {
    "floats": (np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 3, "f4"),
    "nan": (np.array([[np.nan, 1, -np.inf]], np.float32), "f4"),
    "half": (np.arange(4000, dtype=np.float16).reshape(2, 2000) / 16, "f2"),
    "small ints": (np.arange(2500).reshape(5, 500) % 200, "i8"),
    "ints": (np.array([[0, 300, -70000], [1 << 40, 5, 255]]), "i8"),
    "bools": (np.array([[True, False], [False, False]]), "?"),
    "one value": (np.array([[0.5]], np.float32), "f4"),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_boxed_numbers_of_any_kind(name: str, protocol: int, tmp_path: Path) -> None:
    rows, dtype = BOXES[name]
    save_with_protocol(tmp_path / "a.npz", rows.astype(object), protocol)
    with NpzReader(tmp_path / "a.npz") as reader:
        got = list(reader.iterate("a", dtype=dtype))
        assert same(np.stack(got), rows.astype(dtype))
        assert all(row.dtype == np.dtype(dtype) for row in got)


def test_a_dtype_that_is_too_narrow_is_widened_and_never_rounds(tmp_path: Path) -> None:
    rows = np.array([[0.5, 1.0], [0.1, 2.0], [0.5, 1.0]])
    save_with_protocol(tmp_path / "a.npz", rows.astype(object), 4)
    with NpzReader(tmp_path / "a.npz") as reader:
        got = list(reader.iterate("a", dtype="f2"))
        assert [row.dtype.name for row in got] == ["float16", "float64", "float16"]
        assert np.array_equal(np.stack(got), rows)
        assert next(reader.iterate("a", dtype="i4")).dtype == np.float32  # another kind is no wish
    mixed = np.array([[1, 2.5], [True, None]], object)
    save_with_protocol(tmp_path / "b.npz", mixed, 4)
    with NpzReader(tmp_path / "b.npz") as reader:
        assert [row.tolist() for row in reader.iterate("a")] == mixed.tolist()


def test_boxes_without_values_keep_the_wished_dtype(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.asarray([np.zeros((0, 2), np.float32)] * 3, object))
    with NpzReader(tmp_path / "a.npz") as reader:
        assert reader.member("a").shape == (3, 0, 2)
        assert [(row.shape, row.dtype) for row in reader.iterate("a", dtype="f4")] == [((0, 2), np.float32)] * 3


def test_equal_counts_of_dicts_come_back_as_rows(tmp_path: Path) -> None:
    grid = np.empty((2, 3), object)
    for i in range(6):
        grid.flat[i] = {"i": i, "obs": np.arange(i)}
    np.savez(tmp_path / "a.npz", a=grid)
    with NpzReader(tmp_path / "a.npz") as reader:
        rows = list(reader.iterate("a"))
    assert [[d["i"] for d in row] for row in rows] == [[0, 1, 2], [3, 4, 5]]


def test_shared_elements(tmp_path: Path) -> None:
    shared, note = np.arange(5), {"same": "dict"}
    column = objects([shared, note, shared, [note, shared], note])
    np.savez(tmp_path / "a.npz", a=column)
    with NpzReader(tmp_path / "a.npz") as reader:
        assert same(list(reader.iterate("a")), list(column))


def test_a_reference_far_back_is_an_error_to_iterate_and_nothing_to_read(tmp_path: Path) -> None:
    large = np.zeros(5 << 20, np.uint8)
    column = objects([large, *(np.zeros(5 << 20, np.uint8) for _ in range(5)), large])
    np.savez_compressed(tmp_path / "a.npz", a=column)
    with NpzReader(tmp_path / "a.npz") as reader:
        with pytest.raises(FormatError, match=r"16 MiB behind.*read"):
            list(reader.iterate("a"))
        assert len(reader.read("a")[-1]) == 5 << 20


def test_tuples_of_arrays_are_an_error_to_iterate_and_nothing_to_read(tmp_path: Path) -> None:
    column = objects([(np.arange(3), np.arange(2)), (np.arange(1), np.arange(4))])
    np.savez(tmp_path / "a.npz", a=column)
    with NpzReader(tmp_path / "a.npz") as reader:
        with pytest.raises(FormatError, match="tuples"):
            list(reader.iterate("a"))
        assert same(reader.read("a"), column)


def test_random_columns_come_as_numpy_gives_them(tmp_path: Path) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    arrays = st.builds(lambda n, d: np.arange(n).astype(d), st.integers(0, 4), st.sampled_from(["f2", "i8", "?"]))
    atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
    values = st.recursive(
        atoms | arrays,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
        max_leaves=8,
    )

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(st.lists(values, max_size=6), st.sampled_from([2, 3, 4, 5]))
    def check(column: list[Any], protocol: int) -> None:
        save_with_protocol(tmp_path / "a.npz", objects(column), protocol)
        with NpzReader(tmp_path / "a.npz") as reader:
            assert same(list(reader.iterate("a")), column)
        write(tmp_path / "b.npz", b=column)
        assert same(list(np.load(tmp_path / "b.npz", allow_pickle=True)["b"]), column)

    check()


# --- files that mean harm ---------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("wrap", [lambda e: [e], lambda e: [{"a": e}], lambda e: [np.arange(3), e]])
def test_a_pickle_that_would_run_something_is_refused(
    wrap: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_with_protocol(tmp_path / "a.npz", objects(wrap(Evil())), protocol)
    with NpzReader(tmp_path / "a.npz") as reader:
        with pytest.raises(FormatError, match=r"a\.npz, key 'a' asks to run \w+\.mkdir, which is refused.*executed"):
            list(reader.iterate("a"))
        with pytest.raises(FormatError, match="mkdir"):
            reader.read("a")
    assert not (tmp_path / "evil-was-here").exists()


def save_raw(path: Path, data: bytes, shape: tuple[int, ...] = (1,), descr: Any = "|O") -> Path:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", head.getvalue() + data)
    return path


OUTER = (
    b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
)
OUTER += b"X\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]"
HOSTILE = {
    "marks": OUTER + b"(" * 100_000,
    "nested tuples": OUTER + b")" + b"\x85" * 200_000 + b"atb.",
    "nested lists": OUTER + b"]" * 1000 + b"a" * 1000 + b"tb.",
    "in itself": OUTER + b"]q\x00h\x00aatb.",
    "laughs": OUTER + b"]q\x00" + b"".join(b"](h%ch%ce" % (i, i) + b"q%c" % (i + 1) for i in range(60)) + b"atb.",
    "a promise": OUTER + b"\x8e" + struct.pack("<Q", 1 << 60),
    "a promise of text": OUTER + b"\x8d" + struct.pack("<Q", 1 << 40),
    "a huge int": OUTER + b"\x8b" + struct.pack("<i", 1 << 30),
    "a negative int": OUTER + b"\x8b" + struct.pack("<i", -5),
    "underflow": b"\x80\x04\x85.",
    "no value": b"\x80\x04.",
    "no end": OUTER + b"N",
    "nothing": b"",
    "text opcodes": b"I1\n.",
    "a new protocol": b"\x80\x09N.",
    "no array": b"\x80\x04N.",
    "a name as value": OUTER + b"cnumpy\nndarray\natb.",
    "a call of a list": OUTER + b"])Ratb.",
    "a call of ndarray": OUTER + b"cnumpy\nndarray\n)Ratb.",
    "an unfinished array": OUTER + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87Ratb.",
    "an unhashable key": OUTER + b"}]Nsatb.",
    "a state for a list": OUTER + b"]Nbatb.",
    "items for an int": OUTER + b"K\x01K\x02K\x03satb.",
    "an unknown reference": OUTER + b"h\x99atb.",
    "too many elements": OUTER + b"(NNNetb.",
    "too few elements": OUTER + b"tb.",
    "more behind": OUTER + b"Natb.....",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_one_clear_error(name: str, tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.npz", HOSTILE[name])
    with NpzReader(path) as reader:
        with pytest.raises(FormatError, match=r"a\.npz, key 'a'"):
            list(reader.iterate("a"))
        with pytest.raises(FormatError):
            reader.read("a")


def test_hostile_arrays_inside_a_pickle(tmp_path: Path) -> None:
    good = pickle.dumps(objects([np.arange(4, dtype=np.int32)]), 2)
    bad = [good.replace(b"i4", b"i8"), good.replace(b"K\x04\x85", b"K\x05\x85"), good.replace(b"i4", b"O8")]
    bad += [good.replace(b"i4", b"V0"), good.replace(b"i4", b"i9")]
    for data in bad:
        assert data != good
        with NpzReader(save_raw(tmp_path / "a.npz", data)) as reader, pytest.raises(FormatError):
            list(reader.iterate("a"))


def test_every_flipped_byte_is_an_error_or_gives_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", a=[np.arange(6, dtype=np.int16), {"k": (1, 2.5), "é": [None]}], b=ragged(3))
    good = path.read_bytes()
    with NpzReader(path) as reader:
        expected = {name: reader.read(name) for name in reader.names}
    rng = np.random.default_rng(0)
    for at in rng.choice(len(good), 300, replace=False).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << int(rng.integers(8)))]) + good[at + 1 :])
        try:
            with NpzReader(path) as reader:
                got = {name: reader.read(name) for name in reader.names}
        except (FormatError, NotFoundError):
            continue
        for name in got.keys() & expected.keys():
            assert same(got[name], expected[name])


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.1, 3e-5])
def test_a_truncated_file(keep: float, tmp_path: Path) -> None:
    data = (DATA / "coinrun_routes.npz").read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(data[: max(int(len(data) * keep), 5)])
    with pytest.raises(CorruptionError, match=r"cut\.npz is cut off or damaged.*restore"):
        NpzReader(path)


def test_what_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("seed,return\n1,2\n")
    with pytest.raises(FormatError, match=r"text\.npz is not an npz file") as caught:
        NpzReader(tmp_path / "text.npz")
    assert not isinstance(caught.value, CorruptionError)
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(FormatError, match="not an npz"):
        NpzReader(tmp_path / "empty.npz")
    with pytest.raises(NotFoundError, match=r"there is no file .*nope\.npz"):
        NpzReader(tmp_path / "nope.npz")
    with pytest.raises(StorageError):
        NpzReader(tmp_path)


def test_a_missing_key_names_those_there_are() -> None:
    with NpzReader(DATA / "coinrun_routes.npz") as reader, pytest.raises(NotFoundError, match=r"nope.*routes_seed"):
        reader.read("nope")


def test_headers_that_promise_too_much(tmp_path: Path) -> None:
    for shape in [(1 << 40,), (1 << 62, 1 << 62), (-1,)]:
        with NpzReader(save_raw(tmp_path / "a.npz", b"x", shape, "<f8")) as reader, pytest.raises(FormatError):
            reader.read("a")
    with NpzReader(save_raw(tmp_path / "a.npz", b"x" * 20, (2,), "<f8")) as reader, pytest.raises(CorruptionError):
        reader.read("a")
    path = save_raw(tmp_path / "a.npz", b"x" * 8, (1,), [("x", "<f8")])
    with NpzReader(path) as reader, pytest.raises(FormatError, match="structured"):
        reader.read("a")


def test_a_zip_that_declares_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(1000, np.uint8))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 0xF0000000)
    path.write_bytes(data)
    with NpzReader(path) as reader, pytest.raises(CorruptionError, match="declares"):
        reader.read("a")


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("compress", [True, False])
def test_numpy_reads_what_is_written(name: str, compress: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with NpzWriter(path, compress=compress) as out:
        out.objects("a", len(COLUMNS[name]), COLUMNS[name])
        out.array("plain", np.arange(6, dtype=">i2").reshape(2, 3))
        out.array("empty", np.zeros((0, 3)))
        out.scalar_object("meta", {"env": "coinrun", "n": 5, "ok": False})
    loaded = np.load(path, allow_pickle=True)
    assert loaded.files == ["a", "plain", "empty", "meta"]
    assert loaded["a"].shape == (len(COLUMNS[name]),) and loaded["a"].dtype == object
    assert same(list(loaded["a"]), COLUMNS[name])
    assert loaded["meta"].shape == () and loaded["meta"].item() == {"env": "coinrun", "n": 5, "ok": False}
    assert same(loaded["plain"], np.arange(6, dtype=">i2").reshape(2, 3)) and loaded["empty"].shape == (0, 3)
    assert zipfile.ZipFile(path).testzip() is None
    with NpzReader(path) as reader:
        assert same(list(reader.iterate("a")), COLUMNS[name])


def test_arrays_are_writable_and_1d_however_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", a=[np.zeros((4, 2), np.float16)] * 3, one=[np.zeros((4, 2), np.float16)])
    loaded = np.load(path, allow_pickle=True)
    assert loaded["a"].shape == (3,) and loaded["one"].shape == (1,)
    loaded["a"][0][0] = 1


def test_module_names_that_every_numpy_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", a=[np.arange(3), np.float32(1), {"x": np.zeros(2)}])
    assert b"numpy._core" not in zipfile.ZipFile(path).read("a.npy")


def test_equal_input_makes_equal_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    column = [rng.integers(0, 9, (300, 1000), np.uint8) for _ in range(12)]
    made = []
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}.npz"
        with NpzWriter(path, threads=threads) as out:
            out.objects("a", len(column), iter(column))
            out.objects("b", 3, [{"s": {"x", "y", 1, 2.5}}] * 3)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]
    assert same(list(np.load(tmp_path / "2.npz", allow_pickle=True)["a"]), column)


def test_compression_is_as_good_as_numpys(tmp_path: Path) -> None:
    with NpzReader(DATA / "coinrun_routes.npz") as reader:
        column = list(reader.iterate("routes_obs"))
        column = [np.concatenate([a, b]) for a in column for b in column]
    np.savez_compressed(tmp_path / "numpy.npz", a=objects(column))
    ours = write(tmp_path / "ours.npz", a=column).stat().st_size
    assert ours < 1.01 * (tmp_path / "numpy.npz").stat().st_size


def test_elements_may_be_reused_buffers(tmp_path: Path) -> None:
    """The writer keeps no reference: one buffer can be filled again and again."""
    buffer = np.zeros((700, 1000), np.int16)

    def fill() -> Iterator[Any]:
        for i in range(6):
            buffer[:] = i
            yield buffer

    path = tmp_path / "a.npz"
    with NpzWriter(path) as out:
        out.objects("a", 6, fill())
    assert [int(a[5, 5]) for a in np.load(path, allow_pickle=True)["a"]] == list(range(6))


@pytest.mark.parametrize(
    ("value", "what"),
    [(Odd(), "Odd"), ({"a": [Odd()]}, "Odd"), (np.zeros(2, "i4,f4"), "dtype"), (1 << 3000, "int"), (slice(1), "slice")],
)
def test_what_is_not_written_leaves_nothing(value: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=rf"key 'a'\[1\].*{what}"), NpzWriter(tmp_path / "a.npz") as out:
        out.objects("a", 2, [1, value])
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(SchemaError, match="deeper"), NpzWriter(tmp_path / "a.npz") as out:
        out.scalar_object("a", deep)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_count_leaves_nothing(count: int, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=f"2 elements, {count}"), NpzWriter(tmp_path / "a.npz") as out:
        out.objects("a", count, [1, 2])
    assert list(tmp_path.iterdir()) == []


def test_misuse(tmp_path: Path) -> None:
    with NpzWriter(tmp_path / "a.npz") as out:
        out.array("a", [1])
    with pytest.raises(StateError):
        out.array("b", [1])
    with NpzWriter(tmp_path / "b.npz") as out:
        out.array("a", [1])
        with pytest.raises(SchemaError, match="already"):
            out.array("a", [1])
        out.abort()
    with pytest.raises(SchemaError, match="objects"), NpzWriter(tmp_path / "b.npz") as out:
        out.array("a", objects([1]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", a=[1])
    before = path.read_bytes()
    with pytest.raises(AlreadyExistsError, match="overwrite"):
        NpzWriter(path)
    with pytest.raises(SchemaError), NpzWriter(path, overwrite=True) as out:
        out.objects("a", 1, [Odd()])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert write(path, a=[2]).read_bytes() != before


def test_other_ways_to_the_file(tmp_path: Path) -> None:
    with NpzWriter(tmp_path / "deep" / "er" / "a.npz", tmp_dir=tmp_path / "tmp") as out:
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        out.objects("a", 1, [np.arange(3)])
    assert list((tmp_path / "tmp").iterdir()) == []
    assert same(np.load(tmp_path / "deep" / "er" / "a.npz", allow_pickle=True)["a"][0], np.arange(3))
    with NpzWriter(tmp_path / "b.npz", atomic=False) as out:
        assert (tmp_path / "b.npz").exists()
        out.array("a", [1])
    assert np.load(tmp_path / "b.npz")["a"].tolist() == [1]
    with pytest.raises(RuntimeError), NpzWriter(tmp_path / "c.npz", atomic=False) as out:
        raise RuntimeError
    assert not (tmp_path / "c.npz").exists()


def test_a_temporary_folder_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = LocalStorage.rename

    def refuse(self: LocalStorage, source: str, target: str) -> None:
        if target.startswith(".."):
            raise StorageError("cross-device", errno=errno.EXDEV)
        rename(self, source, target)

    monkeypatch.setattr(LocalStorage, "rename", refuse)
    column = [np.arange(1 << 19)]
    with NpzWriter(tmp_path / "out" / "a.npz", tmp_dir=tmp_path / "tmp", compress=False) as out:
        out.objects("a", 1, column)
    assert same(list(np.load(tmp_path / "out" / "a.npz", allow_pickle=True)["a"]), column)
    assert list((tmp_path / "tmp").iterdir()) == [] and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("failing", ["append", "rename"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_full_disk_leaves_nothing(
    failing: str, atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failing == "rename" and not atomic:
        pytest.skip("nothing is renamed")

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("could not write: No space left on device", errno=errno.ENOSPC)

    monkeypatch.setattr(LocalStorage, failing, refuse)
    with pytest.raises(StorageError) as caught, NpzWriter(tmp_path / "a.npz", atomic=atomic) as out:
        out.array("a", np.arange(1000))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
import numpy as np
from trajstore.npz import NpzReader, NpzWriter
base = np.random.default_rng(0).integers(0, 2, (256, 3, 64, 64), np.uint8).astype(np.float16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with NpzWriter(sys.argv[1], compress=False) as out:
    out.objects("a", 40, (base for _ in range(40)))
rows = sum(len(a) for a in NpzReader(sys.argv[1]).iterate("a"))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_largest_element(tmp_path: Path) -> None:
    """240 MB in elements of 6 MB: written and read in a small multiple of one."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "a.npz")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    rows, kib = map(int, done.stdout.split())
    assert rows == 40 * 256
    assert kib < 100_000
