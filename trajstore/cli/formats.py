"""The formats that `import` reads and `export` writes; a new one is a line in the table."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.cli.options import one_of, usage
from trajstore.errors import NotFoundError
from trajstore.format.layout import ROOT
from trajstore.media.hdf5storage import is_hdf5, reading_hdf5
from trajstore.media.storage import is_url
from trajstore.operations.carriage import TITLES, Carriage


@dataclass(frozen=True)
class Format:
    """One foreign format.

    importer : ``module:function(source, destination, *, progress=None, ...)``, which returns a printable report.
    exporter : ``module:function(dataset, path, *, fields=None, progress=None, ...)``, which returns an ``Exported``;
        its module's ``CARRIES`` says by the format's name what is taken along.
    suffixes : of files, markers : of files inside a folder, and hdf5, npz : patterns of names that all stand in such a
        file, by which it is recognised.
    """

    title: str
    importer: str = ""
    exporter: str = ""
    suffixes: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    hdf5: tuple[str, ...] = ()
    npz: tuple[str, ...] = ()


FORMATS = {
    "routes": Format(
        "routes.npz, and ckpt_shards_v1 folders",
        "trajstore.importers.routes:import_routes",
        "trajstore.exporters.routes:export_routes",
        suffixes=(".npz",),
        markers=("manifest.json", "shards"),
        npz=("routes_*",),
    ),
    "rlinf": Format(
        "folders of RLinf's embodied replay buffer",
        "trajstore.importers.rlinf:import_rlinf",
        "trajstore.exporters.rlinf:export_rlinf",
        markers=("trajectory_index.json", "trajector_index.json", "rank_0", "rank_1"),
    ),
    "hdf5": Format(
        "the HDF5 container, which `trajstore` opens as it is",
        "trajstore.importers.hdf5:import_hdf5",
        "trajstore.exporters.hdf5:export_hdf5",
        suffixes=(".h5",),
        hdf5=("manifest", "clocks"),
    ),
    "minari": Format(
        "Minari datasets (HDF5)",
        "trajstore.importers.minari:import_minari",
        "trajstore.exporters.minari:export_minari",
        markers=("data/main_data.hdf5", "main_data.hdf5"),
        hdf5=("episode_*",),
    ),
    "robomimic": Format(
        "robomimic's and Isaac Lab's HDF5",
        "trajstore.importers.robomimic:import_robomimic",
        "trajstore.exporters.robomimic:export_robomimic",
        hdf5=("data",),
    ),
    "d4rl": Format(
        "D4RL's flat HDF5",
        "trajstore.importers.flat:import_d4rl",
        "trajstore.exporters.flat:export_d4rl",
        hdf5=("observations", "actions"),
    ),
    "ogbench": Format(
        "OGBench's flat npz",
        "trajstore.importers.flat:import_ogbench",
        "trajstore.exporters.flat:export_ogbench",
        npz=("observations", "actions", "terminals"),
    ),
    "flat": Format(
        "a plain npz with offsets, no pickles",
        "trajstore.importers.flat:import_flat",
        "trajstore.exporters.flat:export_flat",
        npz=("*.offsets",),
    ),
    "diffusion_policy": Format(
        "diffusion_policy's and UMI's Zarr replay buffers",
        "trajstore.importers.diffusion_policy:import_diffusion_policy",
        "trajstore.exporters.diffusion_policy:export_diffusion_policy",
        markers=("meta/episode_ends",),
    ),
    "lerobot": Format(
        "LeRobot v3 folders",
        "trajstore.importers.lerobot:import_lerobot",
        "trajstore.exporters.lerobot:export_lerobot",
        markers=("meta/info.json",),
    ),
    "table": Format(
        "the table of trajectories, as Parquet or Arrow",
        exporter="trajstore.exporters.table:export_table",
        suffixes=(".parquet", ".arrow", ".feather"),
    ),
    "pt": Format(
        "one .pt a trajectory", "trajstore.importers.tensors:import_pt", "trajstore.exporters.tensors:export_pt"
    ),
    "tensordict": Format(
        "a memory-mapped TensorDict",
        "trajstore.importers.tensors:import_tensordict",
        "trajstore.exporters.tensors:export_tensordict",
        markers=("traj_ids.memmap",),
    ),
}


def names(kind: str) -> list[str]:
    """Of the formats that have an ``importer``, or an ``exporter``."""
    return [name for name, known in FORMATS.items() if getattr(known, kind)]


def load(name: str, kind: str) -> Callable[..., Any]:
    """A format's importer or exporter."""
    module, _, function = str(getattr(FORMATS[name], kind)).partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def carriage(name: str) -> Carriage:
    """What a format's exporter says that it takes along."""
    module = FORMATS[name].exporter.partition(":")[0]
    found: Carriage = importlib.import_module(module).CARRIES[name]
    return found


def carried_table() -> str:
    """What every format takes along, as the Markdown table of docs/interchange.md."""
    lines = [["`--to`", *TITLES.values()], ["---"] * (len(TITLES) + 1)]
    for name in names("exporter"):
        said = carriage(name)
        lines.append([f"`{name}`", *(getattr(said, kind) for kind in TITLES)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recognise(path: str, kind: str, flag: str) -> str:
    """The format of a path, by its suffix or what lies in it. A usage error if that cannot be told."""
    if kind == "exporter":
        found = next((name for name, known in FORMATS.items() if known.exporter and _by_suffix(known, path)), "")
    elif not os.path.exists(path):
        raise usage(f"there is nothing at {path}")
    else:
        found = recognised(path)
    if found:
        return found
    if kind == "importer" and os.path.exists(os.path.join(path, ROOT)):
        raise usage(f"{path} is a Zarr group: of a store, merge or compact makes another; else pass {flag}")
    container = _container(path) if kind == "importer" else ""
    able = [name for name in names(kind) if not container or getattr(FORMATS[name], container)]
    raise usage(f"which format {path} is cannot be told: pass {flag}, one of {', '.join(able)}")


def recognised(path: str) -> str:
    """The name of the foreign format of what lies at a path; ``""`` for one that is not known."""
    container = _container(path)
    members = _members(path, container)
    for name in names("importer"):
        known = FORMATS[name]
        patterns = getattr(known, container) if container else ()
        if patterns and all(fnmatch.filter(members, pattern) for pattern in patterns):
            return name
        if any(os.path.exists(os.path.join(path, marker)) for marker in known.markers):
            return name
        if not container and _by_suffix(known, path):
            return name
    return ""


def _by_suffix(known: Format, path: str) -> bool:
    return bool(known.suffixes) and path.endswith(known.suffixes)


def _container(path: str) -> str:
    """``"hdf5"`` or ``"npz"`` where such a file lies at a path."""
    if not os.path.isfile(path):
        return ""
    return "hdf5" if is_hdf5(path) else "npz" if zipfile.is_zipfile(path) else ""


def _members(path: str, container: str) -> list[str]:
    if container == "npz":
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    if container == "hdf5":
        with reading_hdf5(path) as file:
            return list(map(str, file))
    return []


def store_of(argument: str | None, ckpt_dir: str | None) -> str:
    """The store that a command is to open; data of another format is refused with the way in."""
    path = one_of("STORE", argument, "--ckpt_dir", ckpt_dir)
    if path and not os.path.exists(os.path.join(path, ROOT)) and not is_url(path):
        found = recognised(path)
        if found and found != "hdf5":
            hint = f"take it in with `trajstore import {path} new.zarr`"
            raise NotFoundError(f"{path} is no store, it looks like {FORMATS[found].title}", hint=hint)
    return path


def accepted(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options that were given (not ``None``), refused by name where the format does not know or lacks them."""
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if key not in known and not anything:
            raise usage(f"the format {name} has no option {key!r}; it has {', '.join(sorted(known))}")
    for parameter in parameters:
        needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if needed and parameter.name not in options:
            raise usage(f"the format {name} needs the option {parameter.name!r}: -o {parameter.name}=…")
    return options


def more_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``-o name=value`` options; a value is JSON, or else text."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise usage(f"-o takes NAME=VALUE, not {pair!r}")
        try:
            options[key.strip().replace("-", "_")] = json.loads(text)
        except ValueError:
            options[key.strip().replace("-", "_")] = text
    return options
