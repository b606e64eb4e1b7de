"""Merge: trajectories of many stores in one, at a cost that follows files rather than bytes."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from trajstore.dataset import Dataset, Place
from trajstore.dataset import open as open_dataset
from trajstore.engine.index import natural
from trajstore.engine.order import ascending, distinct, interleaved, parse_keep, shuffled
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.encoding import PROFILES
from trajstore.format.layout import Codec
from trajstore.format.schema import ID
from trajstore.operations.assembly import Contents, Destination, Report, Scaffold, build, located, refuse_existing
from trajstore.operations.heritage import inherit
from trajstore.operations.plan import Layouts, Plan, plan

Source = Union[Place, Dataset]  # noqa: UP007 (at run time, Python 3.10 cannot join a forward reference)

ORDERS = ("source", "interleave", "shuffle")


@dataclass(frozen=True)
class Blueprint:
    """A store that can be built: what goes into it, and how much of it is moved and made."""

    plan: Plan
    contents: Contents

    def summary(self) -> dict[str, Any]:
        """Counts, bytes and notes; see ``Plan.summary``."""
        return self.plan.summary()

    def write(
        self, destination: Destination, *, link: bool = True, client: Any = None, report: Report | None = None
    ) -> Dataset:
        """Build the store and open it. Killed at any moment, it leaves no destination, and can be run again.

        Raises ``AlreadyExistsError`` if something is there, ``LockedError`` if another process is building it.
        """
        parent, name = located(destination)
        place = parent.describe(name)
        for snapshot in self.plan.asked:
            if place.startswith(f"{snapshot.place}/"):
                raise SchemaError(f"{place} lies inside {snapshot.place}, which is read", hint="choose another place")
        scaffold = Scaffold(destination)
        with scaffold as session:
            build(session, self.plan, self.contents, link=link, client=client, report=report)
            scaffold.publish()
        return open_dataset(parent.child(name))


def blueprint(
    dataset: Dataset,
    *,
    keep_ids: bool = False,
    provenance: bool = True,
    rewrite: bool = False,
    strict: bool = False,
    codec: str | Codec | None = None,
    layouts: Layouts | None = None,
    fill: Mapping[str, Any] | None = None,
) -> Blueprint:
    """What a store of a dataset's trajectories, in its order, will be. See ``plan.plan`` and ``heritage.inherit``."""
    if isinstance(codec, str):
        if codec not in PROFILES:
            raise SchemaError(f"{codec!r} is no profile", hint="one of " + ", ".join(PROFILES))
        codec = PROFILES[codec]
    planned = plan(dataset, rewrite=rewrite, strict=strict, codec=codec, layouts=layouts, fill=fill)
    return Blueprint(planned, inherit(planned, keep_ids=keep_ids, provenance=provenance, fill=fill))


def gather_sources(sources: Source | Sequence[Source]) -> Dataset:
    """Stores, folders of stores, patterns (``runs/rank_*``) and datasets as one dataset.

    The stores of a folder or pattern come in the order of their names, ``rank_2`` before ``rank_10``.
    """
    items = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if not items:
        raise NotFoundError("no store was given")
    views: list[Dataset] = []
    places: list[Place] = []
    for item in items:
        if isinstance(item, Dataset):
            if places:
                views.append(open_dataset(places))
                places = []
            views.append(item)
        else:
            places += _expanded(item)  # type: ignore[arg-type]
    if places:
        views.append(open_dataset(places))
    found = views[0]
    for view in views[1:]:
        found = found + view
    return found


def _expanded(place: Place) -> list[Place]:
    if not isinstance(place, (str, os.PathLike)) or os.path.exists(place) or not glob.has_magic(os.fspath(place)):
        return [place]
    found = sorted(glob.glob(os.fspath(place)), key=natural)
    folders: list[Place] = [path for path in found if os.path.isdir(path)]
    if not folders:
        raise NotFoundError(f"no folder is called like {os.fspath(place)}")
    return folders


def choose(
    dataset: Dataset,
    *,
    where: str | None = None,
    dedupe: str | None = None,
    keep: str = "first",
    order: str = "source",
    seed: int = 0,
) -> Dataset:
    """The trajectories that a merge takes, in its order, without writing anything; arguments as of :func:`merge`."""
    if where is not None:
        dataset = dataset.where(where)
    names = list(dataset.table)
    if order not in ORDERS and order.lstrip("-") not in names:
        raise NotFoundError(
            f"{order!r} is no order and no column", hint=f"{', '.join(ORDERS)}, or one of {', '.join(names)}"
        )
    if order == "interleave":
        dataset = dataset[interleaved(dataset.table[ID], dataset.locate(np.arange(len(dataset)))[0])]
    elif order == "shuffle":
        dataset = dataset[shuffled(len(dataset), seed)]
    elif order != "source":
        found = ascending(dataset.table[order.lstrip("-")])
        dataset = dataset[found[::-1] if order.startswith("-") else found]
    if dedupe is not None:
        rule, column = parse_keep(keep)
        dataset = dataset[distinct(dataset.table[dedupe], rule, dataset.table[column] if column else None)]
    return dataset


def plan_merge(
    sources: Source | Sequence[Source],
    *,
    where: str | None = None,
    dedupe: str | None = None,
    keep: str = "first",
    order: str = "source",
    seed: int = 0,
    fill: Mapping[str, Any] | None = None,
    provenance: bool = True,
    rewrite: bool = False,
    codec: str | Codec | None = None,
) -> Blueprint:
    """What :func:`merge` would do, with its bytes; nothing is written."""
    dataset = choose(gather_sources(sources), where=where, dedupe=dedupe, keep=keep, order=order, seed=seed)
    return blueprint(dataset, provenance=provenance, rewrite=rewrite, codec=codec, fill=fill)


def merge(
    sources: Source | Sequence[Source],
    destination: Destination,
    *,
    where: str | None = None,
    dedupe: str | None = None,
    keep: str = "first",
    order: str = "source",
    seed: int = 0,
    fill: Mapping[str, Any] | None = None,
    provenance: bool = True,
    rewrite: bool = False,
    codec: str | Codec | None = None,
    link: bool = True,
    client: Any = None,
    report: Report | None = None,
) -> Dataset:
    """Merge stores into a new one.

    Parameters
    ----------
    sources : a store, a folder of stores, a pattern such as ``"runs/rank_*"``, a dataset, or a list of these.
    destination : where the new store will stand; there must be nothing yet.
    where : only trajectories for which this expression holds, see ``Dataset.where``.
    dedupe, keep : of trajectories with one value of this column, keep the ``"first"`` in the new order, the ``"last"``,
        or that with the largest or smallest value of another one: ``"max:return"``, ``"min:length"``.
    order : ``"source"`` (as the stores come), ``"interleave"`` (the first ids of all stores, then the second ones, …),
        ``"shuffle"`` with ``seed``, or a column's name; with ``-`` before it, descending.
    fill : values of integer and bool columns that only some stores have, see ``union.filling``.
    provenance : whether to add the columns ``source`` (a number in the root attribute ``trajstore_sources``) and
        ``source_id``.
    rewrite : make every file anew, in the new order and without gaps (but a few rows where a source begins). Chunks
        that stay whole are moved as they are, unless another ``codec`` is given.
    codec : of a rewritten store; a profile's name, or a ``Codec``.
    link : whether shard files may be shared with the sources, which costs no bytes; otherwise they are copied.
    client : a ``dask.distributed.Client`` for the encoding.
    report : called with the shards done and all of them.

    Returns
    -------
    Dataset
        The new store, opened. ``id`` counts from 0 in the new order.

    Raises
    ------
    AlreadyExistsError
        There is something at the destination.
    SchemaError
        The stores do not fit together; every field and column that differs is named.
    CorruptionError
        A shard of a source is missing.

    Notes
    -----
    The sources are read as their last commits left them and are never touched; they may be open for writing. The
    destination appears by one rename when it is whole. Linked stores share files: that is safe, for no file of a store
    is ever changed in place, but it is no second copy of the bytes.
    """
    refuse_existing(*located(destination))
    if codec is not None and not rewrite:
        raise SchemaError("a codec is for rewriting", hint="pass rewrite=True too")
    planned = plan_merge(
        sources,
        where=where,
        dedupe=dedupe,
        keep=keep,
        order=order,
        seed=seed,
        fill=fill,
        provenance=provenance,
        rewrite=rewrite,
        codec=codec,
    )
    return planned.write(destination, link=link, client=client, report=report)
