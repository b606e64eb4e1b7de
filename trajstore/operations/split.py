"""Split: one store divided into several, by one rule, at a cost that follows files rather than bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.engine.commit import Session
from trajstore.format.layout import Codec
from trajstore.format.schema import check_distinct, check_name
from trajstore.operations.assembly import Destination, Report, Scaffold, build, located, refuse_existing
from trajstore.operations.merge import Blueprint, Source, blueprint, gather_sources


def plan_split(
    source: Source | Sequence[Source],
    *,
    first: int | None = None,
    fractions: Mapping[str, float] | None = None,
    where: str | None = None,
    mask: np.ndarray[Any, Any] | None = None,
    by: str | None = None,
    parts: int | None = None,
    seed: int | None = None,
    strict: bool = False,
    rewrite: bool = False,
    codec: str | Codec | None = None,
) -> dict[str, Blueprint]:
    """What :func:`split` would write, by the name of each part; nothing is written."""
    dataset = gather_sources(source)
    found = dataset.split(first=first, fractions=fractions, where=where, mask=mask, by=by, parts=parts, seed=seed)
    for name in found:
        check_name(name, "part")
    check_distinct(found, "part")
    single = len(dataset.snapshots) == 1
    return {
        name: blueprint(
            view,
            keep_ids=single,
            provenance=not single,
            strict=strict,
            rewrite=rewrite,
            codec=codec if rewrite else None,
        )
        for name, view in found.items()
    }


def split(
    source: Source | Sequence[Source],
    destination: Destination,
    *,
    first: int | None = None,
    fractions: Mapping[str, float] | None = None,
    where: str | None = None,
    mask: np.ndarray[Any, Any] | None = None,
    by: str | None = None,
    parts: int | None = None,
    seed: int | None = None,
    strict: bool = False,
    rewrite: bool = False,
    codec: str | Codec | None = None,
    link: bool = True,
    client: Any = None,
    report: Report | None = None,
) -> dict[str, Dataset]:
    """Split a store into several, each trajectory into exactly one, which keep their ids.

    Parameters
    ----------
    source : what ``merge`` takes; of several stores, ids are numbered anew and two columns say where each comes from.
    destination : a folder that does not exist; the parts stand in it under their names.
    first, fractions, where, mask, by, parts, seed : the rule, see ``Dataset.split``.
    strict : no bytes of a trajectory that is not in a part travel along with it. Otherwise whole shard files are
        shared, and a part's files may hold rows that its table does not name.
    rewrite, codec, link, client, report : see ``merge``.

    Returns
    -------
    dict
        The parts, opened, by name.

    Raises
    ------
    AlreadyExistsError
        There is something at the destination.
    SchemaError
        No rule is given, or several, or one that makes no names for folders.

    Notes
    -----
    The folder appears with all its parts, by one rename. The source is never touched.
    """
    refuse_existing(*located(destination))
    planned = plan_split(
        source,
        first=first,
        fractions=fractions,
        where=where,
        mask=mask,
        by=by,
        parts=parts,
        seed=seed,
        strict=strict,
        rewrite=rewrite,
        codec=codec,
    )
    return write_parts(planned, destination, link=link, client=client, report=report)


def write_parts(
    planned: Mapping[str, Blueprint],
    destination: Destination,
    *,
    link: bool = True,
    client: Any = None,
    report: Report | None = None,
) -> dict[str, Dataset]:
    """Build planned parts in a folder that appears with all of them."""
    total = sum(len(part.plan.linked) + len(part.plan.encoded) for part in planned.values())
    before = 0
    scaffold = Scaffold(destination)
    with scaffold as outer:
        for name, part in planned.items():
            session = Session(outer.storage.child(name))
            try:
                build(
                    session, part.plan, part.contents, link=link, client=client, report=_shifted(report, before, total)
                )
            finally:
                session.close()
            before += len(part.plan.linked) + len(part.plan.encoded)
        outer.storage.sync_folder("")
        scaffold.publish()
    parent, folder = located(destination)
    return {name: open_dataset(parent.child(f"{folder}/{name}")) for name in planned}


def _shifted(report: Report | None, before: int, total: int) -> Report | None:
    return None if report is None else lambda done, _: report(before + done, total)
