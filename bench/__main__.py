"""``python -m bench``: measure every row, print the table, and keep it as JSON, in a page and as charts."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench.report import GROUPS, Report, line, markdown, versions, with_report
from bench.rows import ROWS, Bench, SkipRow


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="ROW", help="measure this row only (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--short", action="store_true", help="smaller work and three rounds: five minutes in all")
    parser.add_argument("--json", metavar="FILE", help="write the results there too, after each row")
    parser.add_argument(
        "--from", dest="earlier", metavar="FILE", help="begin with these results; only rows of --only are measured"
    )
    parser.add_argument("--markdown", metavar="FILE.md", help="put the results into this page, between its marks")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the ratios beside their bars")
    parser.add_argument("--scaling", metavar="FILE.png", help="draw costs against numbers of trajectories and fields")
    parser.add_argument("--profile", action="append", choices=("ingest", "gather"), help="where the time of this goes")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    options = parser.parse_args(arguments)
    groups, missing = _load()
    if options.list:
        print("\n".join(ROWS))
        return 0
    unknown = set(options.only or ()) - set(ROWS)
    if unknown:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if options.earlier:
        report = Report.from_json(json.loads(Path(options.earlier).read_text()))
    else:
        report = Report(options.short, skipped=dict(missing))
    report.versions = report.versions or versions()
    aside = (options.profile or options.scaling) and not (options.json or options.markdown or options.chart)
    names = options.only or ([] if options.earlier or aside else list(ROWS))
    folder = Path(options.folder or tempfile.mkdtemp(prefix="trajstore-bench."))
    bench = Bench(folder, short=options.short)
    try:
        for position, name in enumerate(names, 1):
            _say(f"[{position}/{len(names)}] {name} …")
            report.groups[name] = groups[name]
            _measure(name, bench, report)
            _keep(report, options.json)
        for name in options.profile or ():
            from bench.profiles import profile

            _say(f"profile of {name} …")
            try:
                report.profilers[name], report.profiles[name] = profile(name, bench)
            except SkipRow as error:
                _say(f"  {name}: {error}")
        if options.scaling:
            from bench import charts, scaling

            if names or not report.scaling:
                _say("scaling …")
                report.scaling = scaling.measure(bench)
            charts.scaling(report.scaling, options.scaling)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    _keep(report, options.json)
    print(f"\n{markdown(report)}")
    if options.markdown:
        page = Path(options.markdown)
        page.write_text(with_report(page.read_text() if page.exists() else "", report))
    if options.chart:
        from bench import charts

        charts.ratios(report, options.chart)
    return 0


def _measure(name: str, bench: Bench, report: Report) -> None:
    begun, used = time.perf_counter(), _processor_seconds()
    claims = []
    report.skipped.pop(name, None)
    try:
        for claim in ROWS[name](bench):
            claims.append(claim)
            print(line(claim), flush=True)
    except (SkipRow, ImportError) as error:
        report.skipped[name] = str(error)
    except Exception as error:  # the other rows are still worth measuring
        traceback.print_exc()
        report.skipped[name] = f"FAILED: {error!r}"
    report.rows[name] = claims
    report.seconds[name] = took = time.perf_counter() - begun, _processor_seconds() - used
    why = report.skipped.get(name)
    total = sum(seconds for seconds, _ in report.seconds.values())
    _say(f"  {name}: {took[0]:.0f} s, {took[1]:.0f} s of processor, {total:.0f} s so far" + (f": {why}" if why else ""))


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _keep(report: Report, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report.to_json(), indent=1, default=float) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load() -> tuple[dict[str, str], dict[str, str]]:
    """Import the modules of rows: each row's heading, and what could not be imported, and why."""
    missing = {}
    for name in (name for names in GROUPS.values() for name in names):
        try:
            importlib.import_module(f"bench.{name}")
        except ImportError as error:
            missing[name] = str(error)
    heading = {f"bench.{module}": group for group, modules in GROUPS.items() for module in modules}
    return {name: heading.get(function.__module__, "Other") for name, function in ROWS.items()}, missing


if __name__ == "__main__":
    sys.exit(main())
