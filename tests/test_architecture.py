"""The house: which room stands on which floor, and that every arrow points down.

A room is a module of `trajstore`, or one of its packages as a whole. A new file must be given a floor here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent / "trajstore"

# Lowest first. A room is a file of `trajstore`, or one of its folders as a whole.
FLOORS: list[tuple[str, set[str]]] = [
    ("format: values; no I/O", {"__about__", "errors", "format", "versions"}),
    ("media: bytes by key, durable; the bytes of a shard", {"media"}),
    ("engine: visibility, bytes to arrays, arrays to bytes", {"engine"}),
    ("faces: what a user holds", {"dataset", "writer"}),
    ("operations: on whole stores, and what formats share", {"npz", "operations", "rlinf", "routes", "sampling"}),
    (
        "edges: one foreign library or format each",
        {"checkpoint", "collect", "exporters", "importers", "monitor", "run", "torch", "view"},
    ),
    ("compat: other systems' names, made of what stands below", {"compat", "demo", "vectordemo"}),
    ("command line", {"cli", "__main__"}),
]
CORE = 4  # floors below this one work with NumPy, numcodecs and google-crc32c alone
# On these floors no room imports its neighbour; in these packages no file imports another.
STRANGERS_ON = {3, 5}
STRANGERS_IN = {"compat", "exporters", "importers"}

# Optional packages, and the only rooms that import them; a room may be one file of a package.
HEAVY = {
    "ale_py": {"demo"},
    "av": {"operations.videoreader", "operations.videowriter"},
    "click": {"cli", "compat"},
    "dask": {"engine.steps", "operations.tasks"},
    "distributed": {"operations.tasks"},
    "gymnasium": {"cli", "collect", "demo", "vectordemo"},
    "h5py": {"exporters", "media.hdf5storage", "importers"},
    "lz4": {"checkpoint", "compat.navrl"},
    "matplotlib": {"checkpoint.plot"},
    "PIL": {"exporters", "importers"},
    "pyarrow": {"exporters", "importers"},
    "rich": {"cli"},
    "tensordict": {"collect", "exporters", "importers", "torch"},
    "torch": {"checkpoint", "collect", "compat", "exporters", "importers", "rlinf", "torch"},
    "zarr": {"demo", "exporters", "importers"},
}

# Of `os`, what touches no file; files belong to storage.
NO_FILES = {
    *("close", "cpu_count", "environ", "fspath", "getpid", "getppid", "kill", "pipe", "read", "register_at_fork"),
    *("sched_getaffinity", "set_blocking", "set_inheritable", "urandom", "write", "PathLike"),
}
FILES_IN = {
    "media.config",
    "media.hdf5storage",
    "media.storage",
}  # config hashes what the user names in it, which is no part of a store
FILE_MODULES = {"fcntl", "glob", "mmap", "pathlib", "shutil", "tempfile"}

MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
}
DOOR = MODULES.pop("__init__", None)  # trajstore/__init__.py names things of every floor


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    for level, (_, rooms) in enumerate(FLOORS):
        if room(module) in rooms:
            return level
    pytest.fail(f"trajstore/{module.replace('.', '/')}: say on which floor it stands (FLOORS in {__file__})")


CORE_MODULES = {m: p for m, p in MODULES.items() if any(room(m) in rooms for _, rooms in FLOORS[:CORE])}


def imports(path: Path, *, types_too: bool = True) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of everything that a file imports, inside functions as well."""
    tree = ast.parse(path.read_text(), str(path))
    nodes = list(ast.walk(tree))
    if not types_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                skipped = {inner for statement in node.body for inner in ast.walk(statement)}
                nodes = [node for node in nodes if node not in skipped]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "optional":
            yield node.lineno, ast.literal_eval(node.args[0])


def rooms_used(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the module's name of everything imported from trajstore itself; "" is its __init__."""
    for line, name in imports(path):
        if name.partition(".")[0] == "trajstore":
            inside = name.partition(".")[2]
            while inside and inside not in MODULES:  # the last part is a thing in a module
                inside = inside.rpartition(".")[0]
            yield line, inside


@pytest.mark.parametrize("module", MODULES)
def test_every_file_stands_on_a_floor(module: str) -> None:
    floor(module)


def test_no_room_stands_on_two_floors() -> None:
    rooms = [name for _, rooms in FLOORS for name in rooms]
    assert len(rooms) == len(set(rooms))


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    for line, used in rooms_used(MODULES[module]):
        arrow = f"trajstore/{module.replace('.', '/')}:{line} imports {used or 'trajstore'}"
        if not used:
            assert floor(module) > CORE, f"{arrow}: the core does not know its door; import from the module itself"
            continue
        assert floor(used) <= floor(module), f"{arrow}, which stands above it"
        if room(used) != room(module):
            strangers = floor(module) in STRANGERS_ON and floor(used) == floor(module)
            assert not strangers, f"{arrow}: {FLOORS[floor(module)][0]}, which never import each other"
        elif room(module) in STRANGERS_IN and used not in (module, room(module)):
            pytest.fail(f"{arrow}: files of {room(module)} never import each other")


def test_no_two_modules_need_each_other() -> None:
    graph = {module: {used for _, used in rooms_used(path) if used} - {module} for module, path in MODULES.items()}
    while leaves := [module for module, used in graph.items() if not used]:
        for leaf in leaves:
            del graph[leaf]
        for used in graph.values():
            used.difference_update(leaves)
    assert not graph, f"these import one another in a circle: {graph}"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_stay_in_their_rooms(module: str) -> None:
    for line, name in imports(MODULES[module], types_too=False):
        rooms = HEAVY.get(name.partition(".")[0])
        where = f"trajstore/{module.replace('.', '/')}:{line}"
        assert rooms is None or {module, room(module)} & rooms, f"{where} imports {name}, which belongs to {rooms}"


def test_the_core_needs_numpy_numcodecs_and_crc32c_alone() -> None:
    """`import trajstore` and all rooms of the core, in a process of their own, load no optional package."""
    wanted = ["trajstore", *(f"trajstore.{module}" for module in CORE_MODULES)]
    code = f"import sys, {', '.join(wanted)}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("module", [module for module in CORE_MODULES if module not in FILES_IN])
def test_files_are_touched_in_storage_only(module: str) -> None:
    path = CORE_MODULES[module]
    tree = ast.parse(path.read_text())
    found = [(line, name) for line, name in imports(path, types_too=False) if name.partition(".")[0] in FILE_MODULES]
    found += [(line, name) for line, name in imports(path) if name.startswith("os.") and name[3:] not in NO_FILES]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "io"):
            if node.attr not in NO_FILES and (node.value.id, node.attr) != ("io", "BytesIO"):
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open" not in defined:
            found.append((node.lineno, "open"))
    assert not found, f"trajstore/{module}.py touches files, which is storage's: {found}"


def test_the_map_in_the_design_names_what_is_there() -> None:
    design = (HOUSE.parent / "docs" / "design.md").read_text()
    named = re.findall(r"`(\w[\w/]*\.py)(?:: ([\w.]+))?`", design)
    assert len(named) > 20
    for path, name in named:
        file = HOUSE.parent / path if path.startswith("tests/") else HOUSE / path
        defined = {getattr(node, "name", "") for node in ast.walk(ast.parse(file.read_text()))}
        assert set(filter(None, name.split("."))) <= defined, f"docs/design.md: {path} has no {name}"
