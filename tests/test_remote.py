"""Stores at URLs: the same rows as from the disk, by our gather and by zarr-python; nothing is written there."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.errors import CorruptionError, NotFoundError, SchemaError, StateError, StorageError
from trajstore.exporters.flat import export_flat
from trajstore.format.layout import clock_array
from trajstore.format.schema import MAIN_CLOCK
from trajstore.media.remotestorage import RemoteStorage
from trajstore.media.storage import is_url, local_path
from trajstore.operations.compact import compact
from trajstore.operations.merge import merge

fsspec = pytest.importorskip("fsspec")


def collect(path: Path, count: int, *, part: str | None = None) -> None:
    rng = np.random.default_rng(count)
    with trajstore.create(path, resume=True, part=part) as writer:
        for seed in range(count):
            steps = int(rng.integers(1, 40))
            trajectory = {
                "obs": {"image": rng.integers(0, 256, (steps, 16, 16, 3)).astype(np.uint8)},
                "reward": rng.normal(size=steps).astype(np.float32),
                "note": f"the {seed}th",
            }
            writer.append(trajectory, seed=seed, success=bool(seed % 3))


def upload(path: Path, url: str) -> str:
    system, root = fsspec.core.url_to_fs(url)
    for file in path.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{root}/{file.relative_to(path).as_posix()}", file.read_bytes())
    return url


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    collect(tmp_path / "store", 50)
    place = f"memory://{tmp_path.name}/store"
    yield upload(tmp_path / "store", place)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def same(remote: trajstore.Dataset, local: trajstore.Dataset) -> None:
    assert len(remote) == len(local) and remote.fields == local.fields and remote.columns == local.columns
    for column in local.columns:
        assert np.array_equal(remote.table[column], local.table[column])
    for path in ("obs/image", "reward"):
        assert np.array_equal(remote.read(path), local.read(path))
    for i in (0, 7, -1):
        assert remote[i]["note"] == local[i]["note"]
        assert np.array_equal(remote[i]["obs/image"][1:5], local[i]["obs/image"][1:5])


def test_a_store_at_a_url_reads_as_on_the_disk(url: str, tmp_path: Path) -> None:
    remote, local = trajstore.open(url), trajstore.open(tmp_path / "store")
    same(remote, local)
    chosen = np.random.default_rng(0).integers(0, len(local), 64)
    steps = np.zeros(64, np.int64)
    for cache_bytes in (0, 1 << 20):
        remote = trajstore.open(url, cache_bytes=cache_bytes)
        assert np.array_equal(remote.take("obs/image", chosen, steps), local.take("obs/image", chosen, steps))
    assert len(remote.where("success")) == len(local.where("success"))
    same(pickle.loads(pickle.dumps(remote)), local)


def test_zarr_python_reads_the_same_there(url: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    local = trajstore.open(tmp_path / "store")
    group = zarr.open_group(store=zarr.storage.FsspecStore.from_url(url), mode="r")
    starts, stops = group[clock_array(MAIN_CLOCK)][:].T
    image = group["steps/obs/image"]
    for i in range(len(local)):
        assert np.array_equal(image[starts[i] : stops[i]], local[i]["obs/image"][:])


def test_parts_at_a_url_are_one_dataset(tmp_path: Path) -> None:
    for rank in range(3):
        collect(tmp_path / "run", 4 + rank, part=f"rank{rank}")
    place = upload(tmp_path / "run", f"memory://{tmp_path.name}/run")
    same(trajstore.open(place), trajstore.open(tmp_path / "run"))


def test_a_store_that_grows_there_is_read_anew(url: str, tmp_path: Path) -> None:
    remote = trajstore.open(url)
    collect(tmp_path / "store", 5)
    upload(tmp_path / "store", url)
    assert len(remote) == 50 and len(remote.refresh()) == 55
    same(remote.refresh(), trajstore.open(tmp_path / "store"))


def test_what_is_missing_or_damaged_there_is_said(url: str) -> None:
    with pytest.raises(NotFoundError, match=r"memory://.*nothing"):
        trajstore.open(f"{url}/nothing")
    with pytest.raises(SchemaError, match="nonsense"):
        trajstore.open("nonsense://there")
    system, root = fsspec.core.url_to_fs(url)
    shard = next(name for name in system.find(root) if "steps/obs/image/" in name and not name.endswith(".json"))
    data = system.cat_file(shard)
    remote = trajstore.open(url)
    system.pipe_file(shard, data[:10] + bytes([data[10] ^ 1]) + data[11:])
    with pytest.raises(CorruptionError, match=r"memory://.*obs/image"):
        remote.read("obs/image")
    system.rm_file(shard)
    with pytest.raises(CorruptionError, match="missing"):
        trajstore.open(url).read("obs/image")


def test_one_rule_says_what_a_url_is(url: str, tmp_path: Path) -> None:
    for path in ("s3://bucket/run", "memory://run", "simplecache::https://host/run", "git+ssh://host/run"):
        assert is_url(path)
        with pytest.raises(StateError, match="is a URL"):
            local_path(path)
    for path in ("run.zarr", "/runs/a:b", "c:/runs", "./runs/s3://x", "", url.encode(), None):
        assert not is_url(path)
    with pytest.raises(StateError, match="with the URL as a str"):
        trajstore.open(Path(url))
    with pytest.raises(SchemaError, match="'' is no path"):
        trajstore.open("")


def test_nothing_is_written_there(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (url, Path(url)):
        with pytest.raises(StateError, match="is a URL"):
            trajstore.create(place, resume=True)
    monkeypatch.chdir(tmp_path)  # where a folder "s3:" would be made
    for made in (merge, compact):
        with pytest.raises(StateError, match="is a URL"):
            made(url, "s3://bucket/new.zarr")
    with pytest.raises(StateError, match="is a URL"):
        export_flat(trajstore.open(url), "s3://bucket/new.npz")
    assert not list(tmp_path.glob("s3*"))
    with pytest.raises(StateError, match="remote stores are only read"):
        RemoteStorage(url).write("x", [b""])


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own file server, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


class Ranged(Plain):
    """One that does."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if wanted is None or not os.path.isfile(path):
            super().do_GET()
            return
        data = Path(path).read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:stop])


@pytest.mark.parametrize("handler", [Ranged, Plain])
def test_over_http(handler: type[Plain], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    collect(tmp_path / "store", 50)
    serve = functools.partial(handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/store"
        same(trajstore.open(place), trajstore.open(tmp_path / "store"))
        assert RemoteStorage(place).read("zarr.json", 10, 1 << 40) == (tmp_path / "store/zarr.json").read_bytes()[10:]
        with pytest.raises(NotFoundError):
            trajstore.open(f"{place}/nothing")
        server.shutdown()
    with pytest.raises(StorageError, match="could not"):
        trajstore.open(place)
