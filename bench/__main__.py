"""``python -m bench``: measure every row, print the table, and keep it as JSON and as a chart."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.rows import ROWS, Bench, Claim, SkipRow

#: Modules of this package that enter rows, in the order of the table.
MODULES = ["ingest", "record", "reading", "lazy", "scaling", "merge", "hdf5", "checkpoint", "replay"]

_VERSIONS = "numpy numcodecs zarr tensorstore zarrs h5py torch torchrl dask".split()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="ROW", help="measure this row only (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--short", action="store_true", help="smaller work and three rounds: five minutes in all")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--markdown", metavar="FILE.md", help="put the table and versions into this page")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the ratios beside their bars")
    parser.add_argument("--scaling", metavar="FILE.png", help="draw costs against the number of trajectories")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    options = parser.parse_args(arguments)
    missing = _load()
    if options.list:
        print("\n".join(ROWS))
        return 0
    unknown = set(options.only or ()) - set(ROWS)
    if unknown:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="trajstore-bench."))
    bench = Bench(folder, short=options.short)
    results: list[tuple[str, Claim]] = []
    skipped: dict[str, str] = dict(missing)
    try:
        for name in options.only or list(ROWS):
            begun = time.perf_counter()
            try:
                for claim in ROWS[name](bench):
                    results.append((name, claim))
                    print(_line(claim), flush=True)
            except (SkipRow, ImportError) as error:
                skipped[name] = str(error)
            except Exception as error:  # the other rows are still worth measuring
                traceback.print_exc()
                skipped[name] = f"FAILED: {error!r}"
            print(f"  [{name}: {time.perf_counter() - begun:.0f} s]", file=sys.stderr, flush=True)
        scaling = None
        if options.scaling:
            from bench.scaling import measure

            scaling = measure(bench)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print()
    print(table([claim for _, claim in results]))
    for name, why in skipped.items():
        print(f"not measured: {name}: {why}")
    report = {
        "versions": versions(),
        "short": options.short,
        "rows": [_as_json(name, claim) for name, claim in results],
        "skipped": skipped,
        "scaling": scaling,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1, default=float) + "\n")
    if options.markdown:
        page = Path(options.markdown)
        page.write_text(_with_table(page.read_text() if page.exists() else _MARKS, report, results))
    if options.chart or options.scaling:
        from bench import charts

        if options.chart:
            charts.ratios([claim for _, claim in results], options.chart)
        if scaling:
            charts.scaling(scaling, options.scaling)
    return 0


_BEGIN, _END = "<!-- begin: python -m bench -->", "<!-- end -->"
_MARKS = f"{_BEGIN}\n{_END}\n"


def _with_table(page: str, report: dict[str, Any], results: list[tuple[str, Claim]]) -> str:
    """The page with what stands between its marks replaced by this run's table."""
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    reached = sum(claim.reached is True for _, claim in results)
    barred = sum(claim.reached is not None for _, claim in results)
    lines = [
        _BEGIN,
        "",
        table([claim for _, claim in results]),
        "",
        f"{reached} of {barred} bars reached.{' A short run.' if report['short'] else ''} Measured with "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        *(f"\nNot measured: {name}: {why}" for name, why in report["skipped"].items()),
        "",
        _END,
    ]
    return before + "\n".join(lines) + after


def _load() -> dict[str, str]:
    """Import the modules of rows; what could not be imported, and why."""
    missing = {}
    for name in MODULES:
        try:
            importlib.import_module(f"bench.{name}")
        except ImportError as error:
            missing[name] = str(error)
    return missing


def _line(claim: Claim) -> str:
    ratio = claim.ratio
    spread = f"[{_short(ratio.low)} … {_short(ratio.high)}]"
    verdict = {True: "reached", False: "SHORT", None: ""}[claim.reached]
    cpu = f" cpu {_short(claim.cpu.median)}×" if claim.cpu else ""
    text = f"{claim.work} | {claim.peer} | {_short(ratio.median)}× {spread}{cpu} | {claim.bar or '—'} {verdict}"
    return text + (f" | {claim.note}" if claim.note else "")


def table(claims: list[Claim]) -> str:
    """The results as a Markdown table with aligned columns."""
    lines = [["work", "peer", "ratio", "spread", "CPU", "bar", "", "peak memory (ours / peer)", "note"]]
    for claim in claims:
        ratio = claim.ratio
        lines.append(
            [
                claim.work,
                claim.peer,
                f"{_short(ratio.median)}×",
                f"{_short(ratio.low)} … {_short(ratio.high)}",
                f"{_short(claim.cpu.median)}×" if claim.cpu else "",
                claim.bar.replace(">=", "≥").replace("<=", "≤"),
                {True: "reached", False: "**short**", None: ""}[claim.reached],
                " / ".join(_bytes(n) for n in claim.peak.values()),
                claim.note,
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def _short(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"


def _bytes(value: int) -> str:
    return f"{value / 2**20:.0f} MiB"


def _as_json(name: str, claim: Claim) -> dict[str, Any]:
    values = {key: value for key, value in vars(claim).items() if key not in ("ratio", "cpu")}
    cpu = vars(claim.cpu) if claim.cpu else None
    return {"row": name, **values, "ratio": vars(claim.ratio), "cpu": cpu, "reached": claim.reached}


def versions() -> dict[str, str]:
    """What was measured with."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


if __name__ == "__main__":
    sys.exit(main())
