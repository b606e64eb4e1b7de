"""``python -m bench.kills``: what is left of a collection that is killed with SIGKILL, for each way of storing it.

A child process collects one episode for each seed and says which ones its storage has reported saved. It is killed at a
random moment and started again where its own storage says it stands; the last child runs to the end. After each kill
everything is read and compared. The ways other than trajstore are those of collectors in use, cut down to what they do
on disk, in the same order; where the files cannot be opened after a kill, the child moves them away and begins again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.ways import WAYS, collect, episode

_MOMENTS = 0.1  # seconds within which a kill falls
# Locks of those that are killed are of no interest to the process that tidies up after them.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
# Children are forked from a process that has everything loaded and runs no threads: a kill costs milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["trajstore.writer", "trajstore.dataset", "bench.ways", "numcodecs.blosc", "h5py", "zarr"]
)


def campaign(
    way: str, folder: Path, kills: int, count: int, chance: random.Random, *, watch: bool = True
) -> dict[str, Any]:
    """Kill a collection so many times, look after each kill at what can be read, let it end, and count.

    watch : look at it while it is being written, too.
    """
    saved: set[int] = set()
    live = unreadable = lost = 0
    for number in range(kills + 1):
        hears, tells = _CONTEXT.Pipe(duplex=False)
        child = _CONTEXT.Process(target=collect, args=(way, folder, count, tells))
        child.start()
        tells.close()
        if number < kills:
            # Some episodes further than the kill before, then any moment of the next ones.
            further = max((count - len(saved)) // (2 * (kills - number)), 1)
            _listen(hears, saved, min(len(saved) + further, count - 1))
            time.sleep(chance.random() * _MOMENTS)
            live += watch and _seeds(way, folder) is None
            child.kill()
        _listen(hears, saved, count + 1)
        hears.close()
        child.join()
        if number == kills and child.exitcode:
            raise RuntimeError(f"{way}: the child failed with status {child.exitcode}")
        found = _seeds(way, folder)
        unreadable += found is None
        seeds = found or []
        lost += len(saved - set(seeds))
        saved &= set(seeds)
    return {
        "way": WAYS[way].title,
        "kills": kills,
        "live": live,
        "unreadable": unreadable,
        "lost": lost,
        "missing": len(set(range(count)) - set(seeds)),
        "twice": sum(number - 1 for number in Counter(seeds).values()),
        "episodes": count,
    }


def _seeds(way: str, folder: Path) -> list[int] | None:
    """The seeds whose episodes can be read and are right; ``None`` where the whole cannot be opened."""
    try:
        return [seed for seed, rows in WAYS[way].read(folder) if same(rows, episode(seed))]
    except Exception:
        return None


def _listen(told: Connection, saved: set[int], until: int) -> None:
    """Hear which seeds are saved, until so many are or the child is no more."""
    while len(saved) < until:
        try:
            saved.add(told.recv())
        except (EOFError, OSError):  # in the middle of a word, too
            return


def same(rows: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.array_equal(rows[name], value) for name, value in expected.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="for each way (default 100)")
    parser.add_argument("--episodes", type=int, default=400, help="to collect (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", action="append", choices=WAYS, help="this way only (repeatable)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for way in options.only or WAYS:
        folder = Path(tempfile.mkdtemp(prefix="trajstore-kills."))
        try:
            chance = random.Random(options.seed)
            results.append(campaign(way, folder / "store", options.kills, options.episodes, chance))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not options.json:
            print(results[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    kills, episodes = options.kills, options.episodes
    print(f"\n{episodes} episodes, kill -9 at {kills} random moments, resumed each time\n")
    print(
        "| stored as | cannot be read while written | cannot be opened after the kill "
        "| saved, then lost | missing at the end | stored twice |"
    )
    print("|---|---|---|---|---|---|")
    for r in results:
        counts = f"{r['live']} of {kills} | {r['unreadable']} of {kills} | {r['lost']} | {r['missing']} | {r['twice']}"
        print(f"| {r['way']} | {counts} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
