"""Readers beside a writer that commits, is killed and resumes as fast as it can: nothing they see is ever wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from tests.campaign.explorer import Violation
from tests.campaign.workload import room, rows_of, state_of, tiny_shards, trajectory
from trajstore.errors import NotFoundError

WRITER = """
import sys
from tests.campaign.workload import open_writer, tiny_shards, trajectory
from trajstore.media.storage import LocalStorage
with tiny_shards():
    writer = open_writer(LocalStorage(sys.argv[1]), resume=True, unique="seed")
    for seed in writer.seeds(range(10**6)):
        writer.append(trajectory(seed), seed=seed)
        if seed % 5 == 4:
            writer._session._children_time = 0  # the arrays' own metadata follow every commit
        writer.commit()
"""


class Hunt:
    """The writer's process, and each kind of reader's look at the store."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.newest = 0  # trajectories seen by a reader of the root
        self.held: list[tuple[Any, Any]] = []  # old snapshots and what they held
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen([sys.executable, "-c", WRITER, str(self.place)], cwd=root)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def crash(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise Violation(f"the writer ended by itself with {self._process.returncode}")
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.counts["writer killed"] += 1
        self.start()

    def _grown(self, count: int, who: str) -> None:
        if count < self.newest:
            raise Violation(f"{who} saw {count} trajectories after {self.newest}")
        self.newest = count
        self.counts[who] += 1

    # -- readers of the root: what they see is the last commit -----------------------------------------------------

    def own(self) -> None:
        dataset = trajstore.open(self.place)
        first = max(0, len(dataset) - 6)
        self._check_seeds(dataset.table["seed"], "own reader")
        numbers = [*range(first, len(dataset)), *self.draw.sample(range(first), min(first, 400))]
        self.counts["reads"] += 1 + len(numbers)
        for number in numbers:
            if dataset[number]["x"][:].tobytes() != rows_of(number)[1]:
                raise Violation(f"own reader: trajectory {number}")
        self._grown(len(dataset), "own reader")
        if self.draw.random() < 0.02:
            self.held.append((dataset[first:], state_of(dataset[first:])))

    def own_held(self) -> None:
        """Old snapshots of ours, and indexes that they hold, across crashes and resumes."""
        if not self.held:
            return
        dataset, before = self.draw.choice(self.held)
        if state_of(dataset) != before:
            raise Violation("an old snapshot has changed")
        self.counts["own reader, old snapshot"] += 1
        self.counts["reads"] += 1 + len(before.trajectories)
        self.held = self.held[-20:]

    def zarr_python(self) -> None:
        import zarr

        self._foreign(zarr.open_group(self.place, mode="r"), "zarr-python")

    def _foreign(self, root: Any, who: str) -> None:
        body = root.attrs["trajstore"]
        rows = [row for start, stop in body["sets"]["rows"] for row in range(start, stop)]
        if rows:
            seeds, pairs, x = root["trajectories/seed"], root["clocks/steps"], root["steps/x"]
            for number in {0, len(rows) - 1, self.draw.randrange(len(rows))}:
                self.counts["reads"] += 3
                row = rows[number]
                start, stop = (int(n) for n in pairs[row])
                if int(seeds[row]) != number or np.asarray(x[start:stop]).tobytes() != rows_of(number)[1]:
                    raise Violation(f"{who}: trajectory {number}")
        self._grown(len(rows), who)

    # -- readers of an array's own metadata: what they see is a prefix ---------------------------------------------

    def tensorstore(self) -> None:
        import tensorstore

        def opened(path: str) -> Any:
            place = {"driver": "file", "path": str(self.place / path)}
            return tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True, open=True).result()

        try:
            pairs, x = opened("clocks/steps"), opened("steps/x")
        except ValueError:
            return  # not written yet: the arrays' own metadata lag
        rows = x.shape[0]
        for start, stop in pairs[max(0, pairs.shape[0] - 8) :].read().result().tolist():
            if 0 <= start < stop <= rows:
                self.counts["reads"] += 1
                values = x[start:stop].read().result()
                seed = int(values[0] - 1) // 16
                if values.tobytes() != trajectory(seed)["x"].tobytes():
                    raise Violation(f"TensorStore: rows {start} to {stop}")
        self.counts["TensorStore"] += 1

    def zarrs(self) -> None:
        import zarr
        import zarrs  # noqa: F401  (registers its codec pipeline)

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            self._foreign(zarr.open_group(self.place, mode="r"), "zarrs")

    def _check_seeds(self, seeds: Any, who: str) -> None:
        if not np.array_equal(seeds, np.arange(len(seeds))):
            raise Violation(f"{who}: seeds {seeds}")


def campaign(seconds: float, seed: int = 0, kinds: tuple[str, ...] = (), reads: int = 100) -> Counter[str]:
    """Readers in turns for so long, and until so much is read; the writer is killed after a dozen commits or so."""
    names = kinds or ("own", "own_held", "zarr_python", "tensorstore", "zarrs")
    with room() as folder, tiny_shards():
        hunt = Hunt(folder / "store", seed)
        hunt.start()
        try:
            deadline = time.monotonic() + 120
            while hunt.newest < 3 and time.monotonic() < deadline:
                try:
                    hunt.own()
                except NotFoundError:
                    time.sleep(0.01)
            end, then = time.monotonic() + seconds, 0
            while time.monotonic() < end or hunt.counts["reads"] < reads:
                getattr(hunt, hunt.draw.choice(names))()
                if hunt.newest > then + 10 and hunt.draw.random() < 0.1:
                    hunt.crash()
                    then = hunt.newest
        finally:
            hunt.stop()
        hunt.counts["trajectories"] = hunt.newest
    return hunt.counts
