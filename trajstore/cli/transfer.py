"""``trajstore import`` and ``trajstore export``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from trajstore.cli import formats
from trajstore.cli.options import json_option, one_of, option, progress_option, usage
from trajstore.cli.output import number, print_json, progress_bar, size


@click.command(name="import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=click.Path())
@click.argument("store", type=click.Path())
@option("--from", "format_name", type=click.Choice(formats.names("importer")), help="By default told from the source.")
@option("--dedupe", type=click.Choice(["seed"]), help="Keep the first trajectory of each seed.")
@option("--skip-unreadable", is_flag=True, help="Leave out files that are damaged, and say so.")
@option("-o", "more", multiple=True, metavar="NAME=VALUE", help="Any other option of the format's Python function.")
@progress_option
@json_option
def import_(
    sources: tuple[str, ...],
    store: str,
    format_name: str | None,
    dedupe: str | None,
    skip_unreadable: bool,
    more: tuple[str, ...],
    no_progress: bool,
    as_json: bool,
) -> None:
    """Take data of another format into a new store.

    SOURCE is a file or folder, or several; it is only read. STORE must not exist; it appears whole or not at all.

    \b
    Example:
      trajstore import ckpt_dir/ run.zarr
      trajstore import routes_a.npz routes_b.npz run.zarr --dedupe seed
    """
    from trajstore.format.arguments import check_count
    from trajstore.operations.output import Exported

    name = format_name or formats.recognise(sources[0], "importer", "--from")
    function = formats.load(name, "importer")
    given = {"dedupe": dedupe, "unreadable": "skip" if skip_unreadable else None, **formats.more_options(more)}
    options = formats.accepted(function, given, name)
    if "limit" in options:
        check_count("limit", options["limit"])
    if len(sources) > 1 and name not in ("routes", "rlinf"):
        raise usage(f"the format {name} takes one SOURCE, not {len(sources)}: import each, and merge the stores")
    source = sources[0] if len(sources) == 1 else list(sources)
    with progress_bar("import", hidden=no_progress or as_json) as progress:
        report = function(source, store, progress=progress, **options)
    if as_json:
        print_json(report)
    elif isinstance(report, Exported):
        _print(report.trajectories, report.warnings, store)
    else:
        click.echo(str(report))


@click.command()
@click.argument("store", required=False, type=click.Path())
@click.argument("out", required=False, type=click.Path())
@option("--ckpt-dir", "ckpt_dir", metavar="STORE", type=click.Path(), help="The store, as an option.")
@option("--out", "--out-npz", "out_option", metavar="OUT", type=click.Path(), help="The file to write, as an option.")
@option("--to", "format_name", type=click.Choice(formats.names("exporter")), help="By default told from OUT.")
@option("-w", "--where", help="Only trajectories for which this holds, e.g. 'success & (length > 50)'.")
@option("--fields", metavar="NAMES", help="These fields only, separated by commas.")
@option("--limit", type=click.IntRange(min=0), help="The first so many trajectories.")
@option("--mode", metavar="MODE", help="routes: full, pkd, cca, pkd_cca or analysis.")
@option("--keys", metavar="NAMES", help="These keys only, separated by commas.")
@option("--max-routes", "max_routes", type=click.IntRange(min=0), help="The first so many trajectories.")
@option("--no-compress", "no_compress", is_flag=True, help="Write without compression.")
@option("--no-atomic", "no_atomic", is_flag=True, help="Write in place, not under a temporary name first.")
@option("--tmp-dir", "tmp_dir", metavar="FOLDER", help="Where the temporary file goes.")
@option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@option("-o", "more", multiple=True, metavar="NAME=VALUE", help="Any other option of the format's Python function.")
@progress_option
@json_option
def export(
    store: str | None,
    out: str | None,
    ckpt_dir: str | None,
    out_option: str | None,
    format_name: str | None,
    where: str | None,
    fields: str | None,
    limit: int | None,
    keys: str | None,
    no_compress: bool,
    no_atomic: bool,
    overwrite: bool,
    more: tuple[str, ...],
    no_progress: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write a store's trajectories in another format.

    The store may be open for writing: what it has committed is exported. OUT is never written over.

    \b
    Example:
      trajstore export run.zarr routes.npz --mode pkd
      trajstore export --ckpt_dir run.zarr --out_npz routes.npz --max_routes 1000
    """
    from trajstore.dataset import open as open_dataset
    from trajstore.errors import NotFoundError, SchemaError

    if ckpt_dir is not None and out is None and out_option is None:
        store, out = None, store  # the only argument is the file
    path = one_of("OUT", out, "--out_npz", out_option)
    name = format_name or formats.recognise(path, "exporter", "--to")
    function = formats.load(name, "exporter")
    given |= {
        "keys": [key.strip() for key in keys.split(",")] if keys is not None else None,
        "fields": [field.strip() for field in fields.split(",")] if fields is not None else None,
        "compress": False if no_compress else None,
        "atomic": False if no_atomic else None,
        "overwrite": True if overwrite else None,
        **formats.more_options(more),
    }
    options = formats.accepted(function, given, name)
    dataset = open_dataset(formats.store_of(store, ckpt_dir))
    if where is not None:
        try:
            dataset = dataset.where(where)
        except (SchemaError, NotFoundError) as error:
            raise usage(f"--where: {error.message}") from error
    if limit is not None:
        dataset = dataset[:limit]
    with progress_bar("export", hidden=no_progress or as_json) as progress:
        done = function(dataset, path, progress=progress, **options)
    count, warnings = done.trajectories, done.warnings
    if as_json:
        print_json({"trajectories": count, "path": path, "bytes": _bytes(path), "format": name, "warnings": warnings})
    else:
        _print(count, warnings, path)


def _print(count: int, warnings: Iterable[str], path: str) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{number(count)} trajectories -> {path} ({size(_bytes(path))})")


def _bytes(path: str) -> int:
    """Of a file, or of all files of a folder."""
    import os

    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, files in os.walk(path) for name in files)
