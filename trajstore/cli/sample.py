"""``trajstore sample``."""

from __future__ import annotations

import time
from itertools import chain, count, islice
from typing import Any

import click

from trajstore.cli.options import json_option, option, store_argument, usage
from trajstore.cli.output import number, print_json, print_pairs, print_table, size


@click.command()
@store_argument
@option("--windows", "length", type=click.IntRange(min=1), metavar="STEPS", help="Steps of a window; else one.")
@option("--stride", type=click.IntRange(min=1), default=1, show_default=True, help="Steps from one window to the next.")
@option("--dilation", type=click.IntRange(min=1), default=1, show_default=True, help="Steps between rows of a window.")
@option("--before", type=click.IntRange(min=0), default=0, help="Steps by which windows may begin too early.")
@option("--after", type=click.IntRange(min=0), default=0, help="Steps by which windows may end too late.")
@option("--pad", type=click.Choice(["repeat", "zero"]), default="repeat", show_default=True, help="What stands there.")
@option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Samples of a batch.")
@option("--batches", type=click.IntRange(min=1), default=50, show_default=True, help="Batches to read.")
@option("--fields", metavar="NAMES", help="Which fields, separated by commas; by default all that make batches.")
@option("--where", help="Only trajectories for which this holds.")
@option("--order", type=click.Choice(["shuffle", "blocks", "sequential"]), default="shuffle", show_default=True)
@option("--weights", metavar="COLUMN", help="Draw in proportion to a column, or from those for which a filter holds.")
@option("--seed", type=int, default=0, show_default=True)
@option("--cache-mb", type=click.IntRange(min=0), default=64, show_default=True, help="Memory for decoded chunks.")
@json_option
def sample(store: str | None, ckpt_dir: str | None, as_json: bool, **given: Any) -> None:
    """Read batches as training does; print keys, shapes and rates.

    \b
    Example:
      trajstore sample run.zarr --windows 16 --stride 4 --batch 64
    """
    from trajstore.cli.formats import store_of
    from trajstore.dataset import open as open_dataset
    from trajstore.errors import NotFoundError, SchemaError
    from trajstore.sampling.sampler import Batches, Order, quality
    from trajstore.sampling.samples import CutSamples
    from trajstore.sampling.windows import Window

    place = store_of(store, ckpt_dir)
    dataset = open_dataset(place, cache_bytes=given["cache_mb"] << 20)
    try:
        if given["where"] is not None:
            dataset = dataset.where(given["where"])
        shape = ("length", "stride", "dilation", "before", "after", "pad")
        window = Window(**{name: given[name] for name in shape}) if given["length"] else None
        fields = [name.strip() for name in given["fields"].split(",")] if given["fields"] is not None else None
        samples = CutSamples(dataset, window, fields=fields)
        if not len(samples):
            raise usage(f"{place} has no sample of this shape: {len(dataset)} trajectories, none long enough")
        weights = samples.weights(given["weights"]) if given["weights"] else None
        order = Order(len(samples), given["seed"], kind=given["order"], block=samples.block, weights=weights)
    except (SchemaError, NotFoundError) as error:
        raise usage(error.message) from error
    batches = Batches(order, min(given["batch"], len(order)))
    numbers = chain.from_iterable(batches.ahead(epoch, 0) for epoch in count())
    wanted = [chosen for chosen, _ in islice(numbers, given["batches"])]
    begun = time.perf_counter()
    first = samples.get(wanted[0])
    for chosen in wanted[1:]:
        samples.get(chosen)
    seconds = time.perf_counter() - begun
    raw = sum(values.nbytes for values in first.values())
    report: dict[str, Any] = {
        "trajectories": len(dataset),
        "samples": len(samples),
        "batch": {path: {"shape": list(values.shape), "dtype": str(values.dtype)} for path, values in first.items()},
        "batch_bytes": raw,
        "batches": len(wanted),
        "seconds": seconds,
        "batches_per_second": len(wanted) / seconds,
        "samples_per_second": len(wanted) * batches.batch_size / seconds,
        "bytes_per_second": len(wanted) * raw / seconds,
    }
    if given["order"] == "blocks" and len(order) >= 4 * batches.batch_size:
        head = order.at(0, _some(len(order)))
        report["shuffle_quality"] = quality(head, batches.batch_size)
    if as_json:
        print_json(report)
        return
    print_table(["key", "shape", "dtype"], [(path, str(v.shape), str(v.dtype)) for path, v in first.items()])
    click.echo()
    pairs = [
        ("trajectories", number(len(dataset))),
        ("samples", number(len(samples))),
        ("batch", size(raw)),
        ("read", f"{len(wanted)} batches in {seconds:.2f} s"),
        ("rate", f"{number(report['batches_per_second'])} batches/s, {number(report['samples_per_second'])} samples/s"),
        ("", f"{size(report['bytes_per_second'])}/s"),
    ]
    if "shuffle_quality" in report:
        found = report["shuffle_quality"]
        pairs.append(("shuffle", f"{found['batch_variance']:.2f} times a uniform order's variance of batch means"))
    print_pairs(pairs)


def _some(length: int) -> Any:
    import numpy as np

    return np.arange(min(length, 1 << 20), dtype=np.int64)
