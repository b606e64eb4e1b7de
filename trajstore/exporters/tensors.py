"""A dataset for torch without this library: one ``.pt`` a trajectory, or one memory-mapped TensorDict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.engine.optional import optional
from trajstore.errors import MissingDependencyError, SchemaError
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import chosen, relation
from trajstore.sampling.samples import nested

CARRIES = {
    "pt": Carriage(
        numbers=KEPT,
        complex_numbers=KEPT,
        bfloat16=KEPT,
        strings=KEPT,
        nested=KEPT,
        extra_row="rows alone",
        epochs="rows alone",
        rate="rows alone",
        ragged="rows alone",
        absent=KEPT,
        columns="as int64, float64",
    ),
    "tensordict": Carriage(numbers=KEPT, complex_numbers=KEPT, bfloat16=KEPT, nested=KEPT, extra_row=KEPT),
}


def export_pt(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a folder of ``trajectory_000000.pt``, each a dict of tensors, nested as the fields are.

    ``torch.load(file, weights_only=True)`` reads them. JSON fields are left out; a field that a trajectory lacks is
    ``None``; bfloat16 stays bfloat16.
    """
    torch = optional("torch", "torch")
    names = chosen(dataset, fields)
    left = [name for name in names if dataset.fields[name].dtype == "json"]
    names = [name for name in names if name not in left]
    width = max(6, len(str(len(dataset))))
    with made_aside(path) as aside:
        os.mkdir(aside)
        for number, trajectory in enumerate(counted(dataset, progress, len(dataset))):
            tree: dict[str, Any] = {name: value.item() for name, value in trajectory.columns.items()}
            for name in names:
                value = trajectory[name]
                if value is not None and not isinstance(value, str):
                    value = torch.from_numpy(np.asarray(value))
                    if dataset.fields[name].dtype == "bfloat16":
                        value = value.to(torch.bfloat16)
                tree[name] = value
            torch.save(nested(tree), os.path.join(aside, f"trajectory_{number:0{width}d}.pt"))
    warnings = (f"JSON fields left out: {', '.join(left)}",) if left else ()
    return Exported(len(dataset), int(dataset.lengths.sum()), warnings)


def export_tensordict(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a memory-mapped TensorDict of all steps end to end, which ``TensorDict.load_memmap`` opens.

    Batch size (steps,); ``traj_ids`` int64 says whose each step is. Fields of T + 1 rows give the first T as they are
    called, and the last T under ``next``, as TorchRL has it. Fields on other clocks, strings, JSON and columns are left
    out, and named in the warnings.
    """
    try:
        import torch
        from tensordict import MemoryMappedTensor, TensorDict
    except ImportError as error:
        raise MissingDependencyError("this needs tensordict", hint="pip install tensordict") from error
    wanted = chosen(dataset, fields)
    relations = {name: "whole" if dataset.fields[name].whole else relation(dataset, name) for name in wanted}
    kept = [name for name in wanted if relations[name] in ("main", "last_row_extra")]
    lengths = dataset.lengths
    steps = int(lengths.sum())
    with made_aside(path) as aside:
        os.mkdir(aside)
        tree = TensorDict({}, batch_size=[steps])
        owner = MemoryMappedTensor.from_tensor(
            torch.from_numpy(np.repeat(np.arange(len(dataset)), lengths)),
            filename=os.path.join(aside, "traj_ids.memmap"),
        )
        tree["traj_ids"] = owner
        for name in counted(kept, progress, len(kept)):
            if (dataset.field_pairs(name)[:, 0] < 0).any():
                raise SchemaError(f"some trajectories have no {name!r}", hint="leave it out with fields=")
            final = relations[name] == "last_row_extra"
            for shift, key in ((0, name), (1, f"next/{name}"))[: 1 + final]:
                tree[tuple(key.split("/"))] = _mapped(dataset, name, shift, steps, os.path.join(aside, key))
        tree.memmap_(aside)
    left = [name for name in wanted if name not in kept]
    warnings = [f"fields left out: {', '.join(left)}"] if left else []
    if dataset.columns:
        warnings.append("columns left out: " + ", ".join(dataset.columns))
    return Exported(len(dataset), steps, tuple(warnings))


def _mapped(dataset: Dataset, name: str, shift: int, steps: int, file: str) -> Any:
    import torch
    from tensordict import MemoryMappedTensor

    os.makedirs(os.path.dirname(file), exist_ok=True)
    spec = dataset.fields[name]
    rows = dataset.steps[name]
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.from_numpy(np.empty(0, rows.dtype)).dtype
    out = MemoryMappedTensor.empty((steps, *rows.shape[1:]), dtype=dtype, filename=f"{file}.memmap")
    at = 0
    for block in _blocks(dataset, name, shift):
        out[at : at + len(block)] = torch.from_numpy(block).to(dtype)
        at += len(block)
    return out


def _blocks(dataset: Dataset, name: str, shift: int) -> Iterator[np.ndarray[Any, Any]]:
    for trajectory in dataset:
        yield trajectory[name][shift : shift + len(trajectory)]
