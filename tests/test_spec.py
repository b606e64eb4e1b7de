"""docs/spec.md is enough: its two readers, run as they stand there, read a store of every kind of field."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.dataset import stores
from trajstore.errors import CorruptionError
from trajstore.format import layout, manifest, schema
from trajstore.format.checksum import crc32, crc32c

SPEC = (Path(__file__).parent.parent / "docs" / "spec.md").read_text()
FIELDS = ("frames", "moved", "obs", "action", "wave", "done", "goal")
BLOCKS = re.findall(r"```python\n(.*?)```", SPEC, re.S)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three sessions, packed frames, a misfit, T + 1 observations, an absent field, gaps."""
    path = tmp_path_factory.mktemp("spec") / "run.zarr"
    rng = np.random.default_rng(0)
    expected = []
    for session in range(3):
        with trajstore.create(path, resume=True) as writer:
            for i in range(100):
                n = int(rng.integers(1, 30))
                trajectory = {
                    "frames": (rng.integers(0, 256, (n, 3, 8, 8)) / 255).astype(np.float16),
                    "moved": (rng.integers(0, 256, (n, 8, 8)) / (255 if session < 2 else 254)).astype(np.float32),
                    "obs": rng.standard_normal((n + 1, 5)),
                    "action": rng.integers(0, 9, n),
                    "wave": rng.standard_normal((n, 2)).astype(np.complex64),
                    "done": rng.random(n) < 0.1,
                    "goal": None if i % 7 == 3 else rng.standard_normal((n, 2)).astype(np.float32),
                    "task": f"pick {i}",
                }
                writer.append(trajectory, seed=100 * session + i)
                expected.append(trajectory)
                if i % 40 == 20:
                    writer.commit()
    rules = {name: field.rule.kind for name, field in trajstore.open(path).fields.items()}
    assert (rules["frames"], rules["moved"]) == ("divide", "plain")
    return path, expected


def namespace(block):
    found = {}
    exec(block, found)
    return found


def test_the_reader_on_zarr_python(store):
    pytest.importorskip("zarr")
    path, expected = store
    read = namespace(BLOCKS[0])["read"]
    for field in FIELDS:
        got = list(read(path, field))
        assert len(got) == len(expected)
        for rows, trajectory in zip(got, expected):
            assert_same(rows, trajectory[field])


def test_the_reader_on_numpy(store):
    path, expected = store
    trajectory = namespace(BLOCKS[1])["trajectory"]
    rows = trajstore.open(path).snapshots[0].live
    for i in [*range(0, 300, 13), 99, 100, 200, 299]:
        for field in FIELDS:
            assert_same(trajectory(path, rows.nth(i), field), expected[i][field])
        assert trajectory(path, rows.nth(i), "task").tobytes().decode() == expected[i]["task"]


def assert_same(got, expected):
    if expected is None:
        assert got is None
    else:
        assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


def test_the_readers_stay_short():
    assert all(len(block.splitlines()) <= 45 for block in BLOCKS)


def test_names_come_from_the_code():
    for name in (layout.STEPS, layout.CLOCKS, layout.TABLE, layout.SEALS, layout.SETS, layout.PRIVATE, layout.COMMITS):
        assert f"{name}/" in SPEC, name
    for name in (*schema.RELATIONS, *manifest.KNOWN_FEATURES, *manifest.SET_NAMES):
        assert f"`{name}`" in SPEC or f"`{name}:" in SPEC or f"`{name}`:" in SPEC, name
    assert f"version {manifest.MAJOR}.{manifest.MINOR}" in SPEC


def test_every_key_of_the_manifest_is_told(store):
    path, _ = store
    body = json.loads((path / "zarr.json").read_text())["attributes"]["trajstore"]
    for key in [*body, *body["format"], *body["commit"], *body["counts"], *body["config"], *body["progress"]]:
        assert f"`{key}`" in SPEC, key
    for key in [*next(iter(body["schema"]["fields"].values())), *body["session"]]:
        assert f"`{key}`" in SPEC, key


class Number(str):
    """A number as it stands in the file."""


def spelled(value):
    """JSON by the words of section 4, without Python's encoder."""
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: [ord(c) for c in pair[0]])
        return "{" + ",".join(f"{spelled(key)}:{spelled(one)}" for key, one in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelled, value)) + "]"
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, str):
        short = dict(zip('"\\\b\f\n\r\t', ('\\"', "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t")))
        return '"' + "".join(short.get(c) or (c if " " <= c <= "~" else escaped(c)) for c in value) + '"'
    return {None: "null", True: "true", False: "false"}[value]


def escaped(character):
    units = np.frombuffer(character.encode("utf-16-le"), "<u2")
    return "".join(f"\\u{unit:04x}" for unit in units)


def test_the_checksum_of_the_manifest(tmp_path):
    config = {
        "\uffff": 1,
        "\U00010000": 2**60,
        'a"\\/\b\f\n\r\t\x01\x7f\x80é\u2028': [0.1, 1e22, -0.0, 5e-324, True, None],
    }
    with trajstore.create(tmp_path / "run.zarr", config=config) as writer:
        writer.append({"a": np.zeros(3)}, seed=2**62)
    text = (tmp_path / "run.zarr" / "zarr.json").read_text()
    root = json.loads(text, parse_int=Number, parse_float=Number)
    said = root["attributes"]["trajstore"].pop("crc32c")
    content = [root["attributes"]["trajstore"], root["consolidated_metadata"]["metadata"]]
    assert f"{crc32c(spelled(content).encode('ascii')):08x}" == said


def test_every_shard_is_told_once(store):
    path, _ = store
    root = json.loads((path / "zarr.json").read_text())
    body, metadata = root["attributes"]["trajstore"], root["consolidated_metadata"]["metadata"]
    seals = namespace(BLOCKS[1])["rows_of"](path, metadata, layout.SEALS, 0, metadata[layout.SEALS]["shape"][0])
    told = [(body["arrays"][array], *shard) for array, *shard in seals.tolist() if array >= 0]
    told += [(array, *shard) for array, shard in body["tails"].items()]
    told += [(layout.SEALS, *shard) for shard in body["seals"]]
    names = [shard[:2] for shard in told]
    assert len(set(names)) == len(names)
    for array, number, length, crc in told:
        if array in metadata:
            data = (path / array / (f"c.{number}" + ".0" * (len(metadata[array]["shape"]) - 1))).read_bytes()
            assert len(data) >= length and crc32(data[:length]) == crc
    files = {(file.parent.relative_to(path).as_posix(), int(file.name.split(".")[1])) for file in path.rglob("c.*")}
    assert {pair for pair in files if pair[0] in metadata} == {pair for pair in names if pair[0] in metadata}


def test_the_index_at_the_end_is_not_enough(tmp_path):
    path, shard = tmp_path / "run.zarr", "steps/a/c.0"
    with trajstore.create(path, commit_every=None) as writer:
        writer.append({"a": np.ones(3, np.int64)})
        writer.commit()
        old = (path / shard).read_bytes()
        writer.append({"a": np.ones(3, np.int64)})
    new = (path / shard).read_bytes()
    assert new.startswith(old) and len(new) > len(old)
    (path / shard).unlink()
    (path / shard).write_bytes(old)
    assert namespace(BLOCKS[1])["trajectory"](path, 1, "a").tolist() == [0, 0, 0]  # padding, as section 3 says
    with pytest.raises(CorruptionError, match="shorter than when it was committed"):
        trajstore.open(path)[1]["a"][:]
    (path / shard).write_bytes(new + b"more")  # the index of the commit lies where its length says
    assert trajstore.open(path)[1]["a"][:].tolist() == [1, 1, 1]


def test_the_stores_in_a_folder(tmp_path):
    for name in ("x-", "x1.10", "x1.5", "rank10", "rank2", "Rank3", "1x", "tmp.1", "gone"):
        trajstore.create(tmp_path / name).close()
    (tmp_path / "other").mkdir()
    shutil.rmtree(tmp_path / "gone" / "__trajstore")
    (tmp_path / "gone" / "zarr.json").unlink()
    names = [Path(one.describe()).name for one in stores(tmp_path)]
    assert names == ["1x", "Rank3", "rank2", "rank10", "x1.5", "x1.10", "x-"]
    (tmp_path / "x-" / "zarr.json").unlink()  # its commits are still there: it is not left out
    with pytest.raises(trajstore.TrajstoreError, match=r"no zarr\.json"):
        trajstore.open(tmp_path)
