"""What every format takes along, and what not: each exporter's own declaration, held to by going out and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import AlreadyExistsError, NotFoundError, TrajstoreError
from trajstore.format.schema import NUMERIC, Clock, Column, Field
from trajstore.operations.carriage import KEPT, LEFT, TITLES

pytest.importorskip("h5py")
pytest.importorskip("click")

from trajstore.cli import formats

LENGTHS = [3, 1, 4, 2, 5]
COUNT = len(LENGTHS)
NEEDS = {
    "diffusion_policy": ["zarr"],
    "lerobot": ["pyarrow", "PIL"],
    "table": ["pyarrow", "pandas"],
    "pt": ["torch"],
    "tensordict": ["torch", "tensordict"],
    "rlinf": ["torch"],
}
OPTIONS: dict[str, dict[str, Any]] = {"lerobot": {"fps": 10}}
FILES = {"hdf5": "a.h5", "routes": "a.npz", "table": "a.parquet"}
FORMATS = formats.names("exporter")
CONFIG = {"gain": 2.5, "env_args": {"env_name": "Reach"}, "env_name": "Reach"}


def extra(i: int, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and columns of every kind, of trajectory i of n steps; their names begin with the kind's."""
    rng = np.random.default_rng(1000 * i + 7)

    def rows(count: int) -> Any:
        return rng.standard_normal((count, 2)).astype(np.float32)

    fields = {f"numbers_{name}": rng.integers(0, 2, (n, 2)).astype(name) for name in NUMERIC if "complex" not in name}
    fields |= {f"complex_numbers_{name}": (rows(n) + 1j * rows(n)).astype(name) for name in NUMERIC[-2:]}
    fields |= {
        "numbers_packed": (rng.integers(0, 256, (n, 2, 2)) / 255).astype(np.float16),
        "bfloat16_x": (rng.integers(-9, 9, (n, 2)) / 4).tolist(),
        "strings_x": f"é {i}",
        "documents_x": {"a": [1, 2.5, None], "b": (i,)},
        "nested_x": {"inner": rows(n)},
        "extra_row_x": rows(n + 1),
        "epochs_x": rows(n + 1),
        "rate_x": rows(2 * n),
        "ragged_x": rows(i * 3 % 4),
        "absent_x": rows(n) if i % 2 else None,
    }
    given = {"columns_level": i} if i % 2 else {}
    return fields, {"columns_gain": i / 2, "columns_won": bool(i % 2), **given}


CLOCKS = {
    "extra_row_x": Clock("last_row_extra"),
    "epochs_x": Clock("first_row_of_each_epoch_extra"),
    "rate_x": Clock("rate", 2),
    "ragged_x": Clock("none"),
}
FIELDS = {"bfloat16_x": Field("bfloat16", (2,)), "documents_x": Field("json")}
FIELDS |= {name: Field("float32", (2,), name) for name in CLOCKS}
COLUMNS = {"columns_level": Column("int32", -1), "columns_gain": Column("float64"), "columns_won": Column("bool")}


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("contract") / "run.zarr", final=True)


@pytest.fixture(scope="module")
def without_final(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("contract") / "run.zarr", final=False)


def make(path: Path, final: bool) -> Any:
    declared: dict[str, Any] = {"fields": FIELDS, "clocks": CLOCKS, "columns": COLUMNS}
    with trajstore.create(path, config=CONFIG, handle_signals=False, **declared) as writer:
        for i, n in enumerate(LENGTHS):
            rng = np.random.default_rng(i)
            more, columns = extra(i, n)
            writer.append(
                {
                    "obs": rng.standard_normal((n + final, 3)).astype(np.float32),
                    "actions": rng.standard_normal((n, 2)).astype(np.float32),
                    "rewards": rng.standard_normal(n).astype(np.float32),
                    "terminations": np.arange(n) == n - 1,
                    "truncations": np.zeros(n, bool),
                    **more,
                },
                seed=100 + i,
                **columns,
            )
    return trajstore.open(path)


@pytest.fixture
def source(request: pytest.FixtureRequest, name: str) -> Any:
    """The store that a format is given: RLinf's buffer has T observations."""
    for module in NEEDS.get(name, []):
        pytest.importorskip(module)
    return request.getfixturevalue("without_final" if name == "rlinf" else "ds")


def place(name: str, folder: Path) -> Path:
    return folder / FILES.get(name, "out")


def exported(name: str, ds: Any, path: Path, **more: Any) -> Any:
    return formats.load(name, "exporter")(ds, path, **OPTIONS.get(name, {}), **more)


def back(name: str, path: Path, folder: Path) -> Any:
    """The dataset that comes back, or for a format without an importer the table that does."""
    if name == "table":
        import pandas

        return pandas.read_parquet(path)
    formats.load(name, "importer")(path, folder / "back.zarr")
    return trajstore.open(folder / "back.zarr")


def equal(a: Any, b: Any) -> bool:
    if a is None or b is None or isinstance(a, (str, dict)):
        return a == b
    a, b = np.asarray(a), np.asarray(b)
    if b.dtype.hasobject:
        return bool(a.tolist() == b.tolist())
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def path_in(name: str, path: str) -> str:
    return f"infos/{path}" if name == "minari" else path


def held(ds: Any, path: str, i: int) -> Any:
    return ds[i][path] if path in ds.fields or path in ds.columns else None


def kept(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    if name == "table":
        for path in [*paths, *columns]:
            assert equal(np.asarray(after[path]), np.asarray(before.table[path]))
        return
    assert len(after) == len(before)
    for path in paths:
        spec, mine = before.fields[path], after.fields[path_in(name, path)]
        assert mine.dtype == spec.dtype
        clocks = [d.schema.clocks[str(f.clock)] for d, f in ((before, spec), (after, mine))]
        assert spec.whole or path not in CLOCKS or clocks[0] == clocks[1]
        for i in range(COUNT):
            assert equal(held(after, path_in(name, path), i), before[i][path]), (path, i)
    for column in columns:
        assert equal(after.column(column), before.column(column))


def rows_alone(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for path in paths:
        assert all(equal(held(after, path, i), before[i][path]) for i in range(COUNT))


def widened(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for path in paths:
        assert after.fields[path_in(name, path)].dtype == "float32"
        for i in range(COUNT):
            assert equal(held(after, path_in(name, path), i), np.asarray(before[i][path], np.float32))


def underlined(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for path in paths:
        assert all(equal(held(after, path.replace("/", "_"), i), before[i][path]) for i in range(COUNT))


def first_rows(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for path in paths:
        assert all(equal(held(after, path, i), before[i][path][: len(before[i])]) for i in range(COUNT))


def no_rows(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for path in paths:
        for i in range(COUNT):
            rows = before[i][path]
            assert len(held(after, path, i)) == 0 if rows is None else equal(held(after, path, i), rows)


def only_columns(*known: str) -> Any:
    def check(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
        assert "seed" in known and equal(after.column("seed"), before.column("seed"))
        assert not set(columns) & set(after.columns)

    return check


def config_of(ds: Any) -> dict[str, Any]:
    found: dict[str, Any] = ds.snapshots[0].manifest.config.get("values", {})
    return found


def some_config(*keys: str) -> Any:
    def check(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
        found = config_of(after)
        assert "gain" not in found
        assert all(found.get(key) == CONFIG[key] for key in keys)

    return check


def python_numbers(name: str, before: Any, after: Any, paths: list[str], columns: list[str]) -> None:
    for column in columns:
        values = before.column(column)
        wide = {"i": np.int64, "f": np.float64, "b": np.bool_}[values.dtype.kind]
        assert equal(after.column(column), values.astype(wide))


#: What a difference that a declaration names means.
DIFFERENCES = {
    "as float32": widened,
    "rows alone": rows_alone,
    "`/` becomes `_`": underlined,
    "the first T": first_rows,
    "no rows": no_rows,
    "as int64, float64": python_numbers,
    "`seed`": only_columns("seed"),
    "`seed`, `success`": only_columns("seed", "success"),
    "`env_args`": some_config("env_args"),
    "spaces, `env_spec`": some_config(),
    "keys of `meta`": some_config("env_name"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_kind_goes_as_it_is_said(name: str, source: Any, tmp_path: Path) -> None:
    path = place(name, tmp_path)
    done = exported(name, source, path)
    assert (done.trajectories, done.steps) == (COUNT, sum(LENGTHS))
    after = back(name, path, tmp_path)
    told = " ".join(done.warnings)
    for kind in TITLES:
        said = getattr(formats.carriage(name), kind)
        paths = [path for path in source.fields if path.startswith(f"{kind}_")]
        columns = [column for column in source.columns if column.startswith(f"{kind}_")]
        assert paths or columns or kind == "configuration"
        if said == LEFT:
            here = [] if name == "table" else [*after.fields, *after.columns]
            for found in [*paths, *columns]:
                assert found in told and not any(found in other for other in here), (kind, found)
            assert name == "table" or kind != "configuration" or "gain" not in config_of(after)
        elif said == KEPT:
            assert not any(found in told for found in [*paths, *columns]), kind
            assert kind != "configuration" or config_of(after) == CONFIG
            kept(name, source, after, paths, columns)
        else:
            DIFFERENCES[said](name, source, after, paths, columns)


@pytest.mark.parametrize("name", FORMATS)
def test_exporters_are_called_alike(name: str, source: Any, tmp_path: Path) -> None:
    path = place(name, tmp_path)
    with pytest.raises(NotFoundError, match="nope"):
        exported(name, source, path, fields=["nope"])
    assert not list(tmp_path.iterdir())
    steps: list[tuple[int, int]] = []
    roles = ["obs", "actions", "rewards", "terminations", "truncations"]
    chosen = ["seed"] if name == "table" else [*roles, "seed"] if name == "routes" else roles
    exported(name, source[1:4], path, fields=chosen, progress=lambda done, total: steps.append((done, total)))
    assert steps and steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(AlreadyExistsError):
        exported(name, source, path)
    after = back(name, path, tmp_path)
    assert len(after) == 3
    assert not any("nested" in found for found in (after if name == "table" else after.fields))


@pytest.mark.parametrize("name", formats.names("importer"))
def test_an_import_appears_whole_or_not_at_all(name: str, source: Any, tmp_path: Path) -> None:
    path = place(name, tmp_path)
    exported(name, source, path)
    load = formats.load(name, "importer")
    calls: list[dict[str, Any]] = [] if name == "hdf5" else [{"nonsense": 1}]  # which moves frames, and takes no option
    for options in calls:
        with pytest.raises(TypeError, match="nonsense"):
            load(path, tmp_path / "new.zarr", **options)
    with pytest.raises(TrajstoreError):
        load(tmp_path / "nowhere", tmp_path / "new.zarr")
    assert list(tmp_path.iterdir()) == [path]
    steps: list[tuple[int, int]] = []
    load(path, tmp_path / "new.zarr", progress=lambda done, total: steps.append((done, total)))
    assert steps and steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "new.zarr"])
    with pytest.raises(AlreadyExistsError):
        load(path, tmp_path / "new.zarr")


def test_the_page_shows_what_is_declared() -> None:
    page = (Path(__file__).parent.parent / "docs" / "interchange.md").read_text()
    assert formats.carried_table() in page
