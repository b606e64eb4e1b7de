"""Run the campaigns: ``python -m tests.campaign --seconds 600 --seed 1 --report report.json [names]``.

Each named campaign (all of them by default) gets an equal share of the time, in turns. The report holds its counts;
the exit status is 1 if any of them found a violation, whose message, with the seed that shows it, is in the report too.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import trajstore


def images(seed: int) -> Counter[str]:
    """Crash images of long random workloads."""
    from tests.campaign.explorer import Explorer

    draw = random.Random(seed)
    explorer = Explorer(seed=seed, build=300, resumes=0.05, again=0.1, foreign=0.02)
    explorer.workload("".join(draw.choices("aaafbrcd", k=draw.randint(3, 9))), wide=draw.random() < 0.3)
    return explorer.counts


def zombies(seed: int) -> Counter[str]:
    """Two writers whose locks lie."""
    from tests.campaign import zombies as campaign

    return campaign.campaign(20, seed)


def damage(seed: int) -> Counter[str]:
    """Damaged and forged files."""
    from tests.campaign import damage as campaign

    return campaign.campaign(200, seed)


def faults(seed: int) -> Counter[str]:
    """Storage operations that fail."""
    from tests.campaign import faults as campaign

    return campaign.campaign(40, seed)


def kills(seed: int) -> Counter[str]:
    """Processes killed and signalled at random moments."""
    from tests.campaign import kills as campaign

    return campaign.campaign(10, seed)


def readers(seed: int) -> Counter[str]:
    """Live readers of all makes beside a writer that is killed."""
    from tests.campaign import readers as campaign

    return campaign.campaign(10, seed)


def reworks(seed: int) -> Counter[str]:
    """Power failures in merges, splits, compactions, deletions and derived arrays."""
    from tests.campaign import reworks as campaign

    return campaign.campaign(10, 2, seed)


def shelves(seed: int) -> Counter[str]:
    """Power failures while checkpoints are saved and removed."""
    from tests.campaign import shelves as campaign

    return campaign.campaign(seed)


def transfers(seed: int) -> Counter[str]:
    """Imports, exports, verifications and reworks of real stores, killed."""
    from tests.campaign import transfers as campaign

    return campaign.campaign(4, seed)


def fuzz(seed: int) -> Counter[str]:
    """Inputs to the parsers, made from valid ones."""
    from itertools import islice

    from tests.campaign import fuzz as campaign

    counts = Counter(campaign.one(data) for data in islice(campaign.mutants(seed), 20_000))
    counts["inputs"] = sum(counts.values())
    return counts


CAMPAIGNS: dict[str, Callable[[int], Counter[str]]] = {
    function.__name__: function
    for function in (images, zombies, damage, faults, kills, readers, reworks, shelves, transfers, fuzz)
}


def run(names: list[str], seconds: float, seed: int) -> dict[str, Any]:
    """Run campaigns in turns until the time is over; the report."""
    begun = time.time()
    report: dict[str, Any] = {
        "seed": seed,
        "seconds": seconds,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "versions": {
            "trajstore": trajstore.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "system": platform.platform(),
        },
        "campaigns": {name: {"rounds": 0, "seconds": 0.0, "counts": Counter()} for name in names},
        "violations": [],
    }
    while time.time() - begun < seconds:
        # Whoever had least of the time so far has the next turn.
        name = min(names, key=lambda name: report["campaigns"][name]["seconds"])
        mine = report["campaigns"][name]
        turn = seed * 1_000_003 + mine["rounds"]
        started = time.time()
        try:
            mine["counts"].update(CAMPAIGNS[name](turn))
        except Exception as error:
            report["violations"].append({"campaign": name, "seed": turn, "message": f"{error!r}"[:4000]})
        mine["rounds"] += 1
        mine["seconds"] += time.time() - started
    report["seconds"] = round(time.time() - begun, 1)
    for mine in report["campaigns"].values():
        mine["seconds"] = round(mine["seconds"], 1)
        mine["counts"] = dict(sorted(mine["counts"].items()))
    return report


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Several reports as one: counts and times added, and under ``runs`` when, with which seed and for how long."""
    total: dict[str, Any] = {"seconds": 0.0, "runs": [], "campaigns": {}, "violations": []}
    for report in reports:
        total["seconds"] = round(total["seconds"] + report["seconds"], 1)
        total["runs"].append({name: report[name] for name in ("begun", "seconds", "seed", "versions")})
        total["violations"] += report["violations"]
        for name, found in report["campaigns"].items():
            mine = total["campaigns"].setdefault(name, {"rounds": 0, "seconds": 0.0, "counts": {}})
            mine["rounds"] += found["rounds"]
            mine["seconds"] = round(mine["seconds"] + found["seconds"], 1)
            mine["counts"] = dict(sorted((Counter(mine["counts"]) + Counter(found["counts"])).items()))
    return total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CAMPAIGNS, []], default=[], help="which; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="how long in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--join", nargs="+", metavar="FILE", help="run nothing: make one report of these")
    parser.add_argument("--report", help="file for the report, JSON; standard output by default")
    options = parser.parse_args(arguments)
    if options.join:
        report = joined([json.loads(Path(file).read_text()) for file in options.join])
    else:
        report = run(options.names or list(CAMPAIGNS), options.seconds, options.seed)
    text = json.dumps(report, indent=1)
    if options.report:
        with open(options.report, "w") as file:
            file.write(text + "\n")
    else:
        print(text)
    print(f"{len(report['violations'])} violations", file=sys.stderr)
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
