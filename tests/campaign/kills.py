"""Real processes killed and signalled at random moments, with a log in the parent of what they were acknowledged.

A collector process forks from a parent that has everything imported, writes the seed of each acknowledged commit into
a pipe, and dies at a random moment; the next one resumes. Its writer commits by call, by count, by timer or from
another thread, and has children of its own, as a collector has environment workers.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import trajstore
from tests.campaign.explorer import Violation
from tests.campaign.workload import State, recover, room, rows_of, tiny_shards, trajectory
from trajstore.media.storage import LocalStorage

SEEDS = range(1_000_000)
HOW = ("call", "count", "timer", "thread", "fork")


def _collect(place: Path, log: int, how: str) -> None:
    """The collector: one trajectory a seed, for ever; every acknowledgement is one line in the log."""
    options = {"commit_trajectories": 3} if how == "count" else {"commit_every": 0.02 if how == "timer" else None}
    writer = trajstore.create(place, resume=True, unique="seed", config={"run": "kills"}, **options)  # type: ignore[arg-type]
    if how == "fork" and os.fork() == 0:  # an environment worker that outlives its parent for a while
        time.sleep(0.3)
        os._exit(0)
    if how == "thread":

        def commit() -> None:
            while True:
                before = len(writer)
                writer.commit()
                os.write(log, b"= %d\n" % before)
                time.sleep(0.001)  # a lock is not fair: without a pause nobody else might get it for long

        threading.Thread(target=commit, daemon=True).start()
    for seed in writer.seeds(SEEDS):
        if seed % 7 == 6:
            continue  # a seed that yields nothing
        writer.append(trajectory(seed), seed=seed)
        os.write(log, b"+ %d\n" % seed)
        if how in ("call", "fork"):
            writer.commit()
            os.write(log, b"%d\n" % seed)
        time.sleep(0.0005)


class Collection:
    """One store and the processes that fill it."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.draw = random.Random(seed)
        self.acknowledged: set[int] = set()
        self.least = 0  # trajectories that were acknowledged by number
        self.counts: Counter[str] = Counter()

    def one(self, number: int, longest: float) -> None:
        """Start a collector, end it at a random moment, and look at what is there."""
        how = self.draw.choice(HOW)
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks in processes that have threads
            child = os.fork()
        if child == 0:
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.close(reading)
                with tiny_shards():
                    _collect(self.place, writing, how)
            except KeyboardInterrupt:
                code = 130
            except BaseException as error:
                os.write(2, f"{how}: {error!r}\n".encode())
            finally:
                os._exit(code)
        os.close(writing)
        lines: list[bytes] = []
        listener = threading.Thread(target=self._listen, args=(reading, lines))
        listener.start()
        time.sleep(self.draw.random() * longest)
        os.kill(child, number)
        deadline = time.monotonic() + 120
        again = time.monotonic() + 5
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise Violation(f"a collector ({how}) did not end on signal {number}")
            if number == signal.SIGINT and time.monotonic() > again:
                # Python drops a KeyboardInterrupt that is raised inside a destructor or a callback: press it again.
                os.kill(child, number)
                again += 5
                self.counts["SIGINT sent again"] += 1
            time.sleep(0.001)
        listener.join(10)
        if os.waitstatus_to_exitcode(status) == 70:
            raise Violation(f"a collector ({how}) failed")
        self.counts[f"{signal.Signals(number).name} ({how})"] += 1
        self._check(b"".join(lines), number)

    @staticmethod
    def _listen(reading: int, lines: list[bytes]) -> None:
        while data := os.read(reading, 1 << 16):
            lines.append(data)
        os.close(reading)

    def _check(self, log: bytes, number: int) -> None:
        for line in log.split(b"\n")[:-1]:
            if line.startswith(b"+"):
                if number != signal.SIGKILL:  # then nothing that was appended is lost, committed or not
                    self.acknowledged.add(int(line[1:]))
            elif line.startswith(b"="):
                self.least = max(self.least, int(line[1:]))
            else:
                self.acknowledged.add(int(line))
        storage = LocalStorage(self.place)
        found = recover(storage)
        if not isinstance(found, State):
            if self.acknowledged or self.least:
                raise Violation("the store is gone")
            return
        seeds = [rows[0] for rows in found.trajectories]
        lost = self.acknowledged - set(seeds)
        if lost or len(seeds) < self.least:
            raise Violation(f"lost {sorted(lost)}, {len(seeds)} of {self.least}")
        if seeds != sorted(set(seeds)):
            raise Violation("a seed twice, or out of order")
        expected = [seed for seed in range(seeds[-1] + 1) if seed % 7 != 6] if seeds else []
        if seeds != expected:
            raise Violation(f"seeds were skipped: {sorted(set(expected) - set(seeds))}")
        if any(rows != rows_of(rows[0]) for rows in found.trajectories):
            raise Violation("wrong rows")
        self.counts["ended"] += 1
        self.counts["acknowledged"] = len(seeds)


def campaign(count: int, seed: int = 0, longest: float = 0.25) -> Counter[str]:
    """So many collectors ended, three in five by SIGKILL, the others by SIGTERM and SIGINT."""
    sys.stdout.flush()
    with room() as folder:
        collection = Collection(folder / "store", seed)
        for _ in range(count):
            number = collection.draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
            collection.one(number, longest)
    return collection.counts
