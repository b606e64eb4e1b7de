"""Torch's own files into a store: one ``.pt`` a trajectory, and a memory-mapped TensorDict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.errors import FormatError, MissingDependencyError, NotFoundError
from trajstore.format.schema import Clock, Field
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported


def import_pt(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a folder of ``.pt`` files, each the nested dict of one trajectory's tensors.

    Files come in the order of their names; tensors, strings and ``None`` become fields, numbers columns, but ``id``,
    which a store gives. They are read with ``weights_only=True``: what asks for more than tensors is refused.
    Raises ``NotFoundError``, ``FormatError``.
    """
    torch = optional("torch", "torch")
    place = os.fspath(source)
    files = sorted(name for name in os.listdir(place) if name.endswith(".pt")) if os.path.isdir(place) else []
    if not files:
        raise NotFoundError(f"there are no .pt files in {place}")

    def trajectories() -> Iterator[Parts]:
        for name in files[:limit]:
            try:
                tree = torch.load(os.path.join(place, name), map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file makes of the reader
                raise FormatError(f"{os.path.join(place, name)} cannot be read: {error!r:.200}") from error
            if not isinstance(tree, dict):
                raise FormatError(f"{os.path.join(place, name)} holds no dict, but a {type(tree).__name__}")
            leaves = dict(_leaves(tree, ""))
            columns = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, (bool, int, float))}
            fields = {path: leaf for path, leaf in leaves.items() if path not in columns}
            columns.pop("id", None)
            yield fields, columns

    return fill_store(destination, trajectories(), len(files[:limit]), progress=progress, **options)


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", leaf


def import_tensordict(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a memory-mapped TensorDict of steps end to end, whose ``traj_ids`` says whose each one is.

    A tensor that stands under ``next`` too, and goes on there by one step, bit for bit, becomes a field of T + 1 rows;
    what does not stays, as fields under ``next``. Raises ``FormatError``.
    """
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise MissingDependencyError("this needs tensordict", hint="pip install tensordict") from error
    place = os.fspath(source)
    try:
        tree = TensorDict.load_memmap(place)
        owners = tree["traj_ids"].numpy()
    except (OSError, KeyError, ValueError) as error:
        raise FormatError(f"{place} is no memory-mapped TensorDict with traj_ids: {error!r:.200}") from error
    stops = np.append(np.flatnonzero(np.diff(owners)) + 1, len(owners)) if len(owners) else owners
    runs = list(zip([0, *stops[:-1].tolist()], stops.tolist()))[:limit]
    leaves: dict[str, Any] = dict(tree.flatten_keys("/").items())
    del leaves["traj_ids"]
    joined = [path for path in leaves if f"next/{path}" in leaves and _goes_on(leaves, path, runs)]
    kept = [path for path in leaves if not (path.startswith("next/") and path[5:] in joined)]
    fields = {
        path: Field(str(leaves[path].dtype).removeprefix("torch."), leaves[path].shape[1:], clock)
        for path in kept
        for clock in ["observations" if path in joined else "steps"]
    }
    clocks = {"steps": Clock("main"), **({"observations": Clock("last_row_extra")} if joined else {})}

    def trajectories() -> Iterator[Parts]:
        import torch

        for start, stop in runs:
            rows = {path: leaves[path][start:stop] for path in kept}
            for path in joined:
                rows[path] = torch.cat((rows[path], leaves[f"next/{path}"][stop - 1 : stop]))
            yield rows, {}

    declared = {"fields": fields, "clocks": clocks, **options}
    return fill_store(destination, trajectories(), len(runs), progress=progress, **declared)


def _goes_on(leaves: Mapping[str, Any], path: str, runs: list[tuple[int, int]]) -> bool:
    """Whether what stands under ``next`` is the tensor one step later, so that T + 1 rows hold both."""
    now, later = leaves[path], leaves[f"next/{path}"]
    if now.dtype != later.dtype or now.shape != later.shape:
        return False
    return all(_bits(now[start + 1 : stop]) == _bits(later[start : stop - 1]) for start, stop in runs)


def _bits(rows: Any) -> bytes:
    import torch

    data: bytes = rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
