"""A disk that fails: any operation of a workload, once or for good, before it is done, half done, or after."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tests.campaign.disk import Disk, Tapped
from tests.campaign.explorer import Violation
from tests.campaign.workload import State, one_by_one, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import AlreadyExistsError, ConflictError, LockedError, StateError, StorageError

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ESTALE, errno.EROFS, errno.EACCES)
EXPECTED = (StorageError, StateError, ConflictError)
SEEDS = (0, 1, 2, 5, 8, 11, 3)


class Fault:
    """Fails the n-th operation, or every one from the n-th on; of reads too.

    moment : ``before`` the operation does anything, ``after`` it was done all the same, or ``half``: a write that
        leaves part of its file behind (as no port may, but a network disk does).
    """

    def __init__(self, at: int, code: int, moment: str, persistent: bool) -> None:
        self.at = at
        self.code = code
        self.moment = moment
        self.persistent = persistent
        self.count = 0
        self.hits = 0
        self.on = True
        self.name = ""

    def __call__(self, name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        self.count += 1
        hit = self.on and (self.count == self.at or (self.persistent and self.count > self.at))
        if not hit:
            return call()
        self.hits += 1
        self.name = self.name or name
        if self.moment == "after" and name in ("rename", "link", "remove", "make_folder", "sync_folder"):
            call()
        raise StorageError(f"{name} failed on purpose", errno=self.code)


def play(at: int, code: int = errno.EIO, moment: str = "before", persistent: bool = False) -> tuple[Fault, int]:
    """A workload with one fault; what was acknowledged is there whatever happens, and afterwards it goes on.

    Returns the fault, and how many commits failed. Raises ``Violation``.
    """
    what = f"operation {at} fails ({errno.errorcode[code]}, {moment}, {'for good' if persistent else 'once'})"
    disk, fault = Disk(), Fault(at, code, moment, persistent)
    storage: Any = Tapped(disk.storage(), fault)
    acknowledged: list[int] = []
    attempted: list[int] = []
    failed = 0
    with tiny_shards(), one_by_one():
        writer = None
        try:
            for number, seed in enumerate(SEEDS):
                if number == 4 and writer is not None:  # another session in the middle
                    writer.close()
                    acknowledged = list(attempted)
                    writer = None
                if writer is None:
                    writer = open_writer(storage, resume=number > 0)
                try:
                    writer.append(trajectory(seed), seed=seed)
                    attempted.append(seed)
                    writer.commit()
                    acknowledged = list(attempted)
                except EXPECTED:
                    failed += 1
        except (*EXPECTED, AlreadyExistsError):
            failed += 1  # opening or closing failed
        except Exception as error:
            raise Violation(f"{what}: {error!r}") from error
        _check(what, disk, acknowledged, attempted)
        fault.on = False
        if writer is not None:
            try:  # the disk is well again: the next commit works, or says that this writer cannot go on
                writer.commit()
                acknowledged = list(attempted)
            except (StateError, ConflictError, StorageError):
                failed += 1
            writer.abandon()
        found = _check(what, disk, acknowledged, attempted)
        try:
            with open_writer(disk.storage(), resume=True) as writer:
                writer.append(trajectory(40), seed=40)
        except LockedError as error:
            raise Violation(f"{what}: the lock was not released") from error
        except Exception as error:
            raise Violation(f"{what}, resumed: {error!r}") from error
        later = recover(disk.storage())
        before = found.trajectories if isinstance(found, State) else ()
        if not isinstance(later, State) or later.trajectories[: len(before)] != before:
            raise Violation(f"{what}, resumed: {later} after {found}")
        if later.trajectories[-1] != rows_of(40):
            raise Violation(f"{what}, resumed: {later}")
    return fault, failed


def _check(what: str, disk: Disk, acknowledged: list[int], attempted: list[int]) -> State | str:
    try:
        found = recover(disk.storage())
    except Exception as error:
        raise Violation(f"{what}: then {error!r}") from error
    seeds = [rows[0] for rows in found.trajectories] if isinstance(found, State) else []
    if not set(acknowledged) <= set(seeds) <= set(attempted) or len(set(seeds)) < len(seeds):
        raise Violation(f"{what}: {seeds} instead of {acknowledged} to {attempted}")
    if isinstance(found, State) and any(rows != rows_of(rows[0]) for rows in found.trajectories):
        raise Violation(f"{what}: wrong rows")
    return found


def length() -> int:
    """Operations of the workload, reads included."""
    return play(1 << 30)[0].count


def plays(seed: int = 0) -> list[tuple[int, int, str, bool]]:
    """Every operation with every error, moment and duration, in an order of the seed's."""
    found = [
        (at, code, moment, persistent)
        for at in range(1, length() + 1)
        for code in ERRORS
        for moment in ("before", "after")
        for persistent in (False, True)
    ]
    random.Random(seed).shuffle(found)
    return found


def some(chosen: Iterable[tuple[int, int, str, bool]]) -> Counter[str]:
    """These faults."""
    counts: Counter[str] = Counter()
    for one in chosen:
        fault, failed = play(*one)
        counts["faults"] += 1
        counts[f"in {fault.name}"] += 1
        counts["calls that failed"] += failed
        counts["operations that failed"] += fault.hits
    return counts


def campaign(count: int, seed: int = 0) -> Counter[str]:
    """So many faults at random."""
    return some(plays(seed)[:count])
