"""Real system calls that fail, or kill, at every place where a collector makes them; and disks that are full.

Each collector is forked from a process with everything imported. ``strace`` is attached to it before it begins, and
has the n-th call of a kind fail, or kills the process there. By itself:
``python -m tests.campaign.calls strace|full COUNT SEED`` prints its counts as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.campaign.disk import Disk
from tests.campaign.explorer import Violation
from tests.campaign.transfers import in_child
from tests.campaign.workload import Run, State, one_by_one, open_writer, recover, room, rows_of, tiny_shards, trajectory
from trajstore.errors import TrajstoreError
from trajstore.media.storage import LocalStorage

#: How often a collector of four commits makes each call, at the least, and how the call fails.
CALLS = {
    "fdatasync": (40, ("EIO", "ENOSPC")),
    "fsync": (16, ("EIO", "EDQUOT")),
    "rename": (14, ("EIO", "ESTALE")),
    "link,linkat": (12, ("ENOSPC", "EMLINK")),
    "writev": (40, ("ENOSPC", "EDQUOT", "EIO")),
    "copy_file_range": (14, ("EIO",)),
    "mkdir": (8, ("ENOSPC",)),
    "openat": (80, ("EMFILE", "EACCES")),
    "unlink": (20, ("EIO",)),
    "pread64": (20, ("EIO",)),
    "flock": (1, ("ENOLCK",)),
}
BEGUN = (0, 1, 2, 3)
STEP = 4  # seeds that a collector appends


def strace_works() -> bool:
    """Whether strace is installed and may be attached to another process."""
    if shutil.which("strace") is None or not hasattr(os, "fork"):
        return False
    child = subprocess.Popen(["sleep", "20"])
    try:
        command = ["strace", "-qq", "-o", os.devnull, "-p", str(child.pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        attached = _attached(child.pid, tracer)
        tracer.terminate()
        tracer.wait()
        return attached
    finally:
        child.kill()
        child.wait()


def _attached(pid: int, tracer: subprocess.Popen[bytes]) -> bool:
    """Wait until a process is traced; whether it is, and not its tracer gone."""
    while tracer.poll() is None:
        status = Path(f"/proc/{pid}/status").read_text()
        if "TracerPid:\t0\n" not in status:
            return True
        time.sleep(0.0005)
    return False


def _collect(place: Path, first: int, log: int) -> None:
    """A collector: the seeds of acknowledged commits go to ``log``; errors of ours are as good as any answer."""
    with tiny_shards(), one_by_one():
        try:
            writer = open_writer(LocalStorage(place), resume=True)
            for seed in range(first, first + STEP):
                writer.append(trajectory(seed), seed=seed)
                try:
                    writer.commit()
                    os.write(log, b"%d\n" % seed)
                except TrajstoreError:
                    continue
            writer.close()
            os.write(log, b"closed\n")
        except TrajstoreError:
            pass


def collect(
    place: Path, first: int, tracer: list[str] | None = None, limit: int | None = None
) -> tuple[list[int], int]:
    """A collector in a process of its own, traced or not: the seeds acknowledged, and its exit status."""
    log_reading, log_writing = os.pipe()
    go_reading, go_writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.read(go_reading, 1)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            _collect(place, first, log_writing)
            code = 0
        except BaseException as error:
            traceback.print_exception(error)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(log_writing)
    os.close(go_reading)
    strace = None
    if tracer is not None:
        strace = subprocess.Popen([*tracer, "-p", str(child)], stderr=subprocess.DEVNULL)
        if not _attached(child, strace):
            raise Violation("strace could not be attached")
    os.write(go_writing, b"!")
    os.close(go_writing)
    said = b""
    while data := os.read(log_reading, 1 << 16):
        said += data
    os.close(log_reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if strace is not None:
        strace.wait()
    lines = said.split()
    acknowledged = [int(line) for line in lines if line.isdigit()]
    return (list(range(first, first + STEP)) if b"closed" in lines else acknowledged), status


def _held(place: Path) -> str:
    with tiny_shards():
        found = recover(LocalStorage(place))
    if not isinstance(found, State):
        return "[]"
    if any(rows != rows_of(rows[0]) for rows in found.trajectories):
        raise Violation("wrong rows")
    return json.dumps([rows[0] for rows in found.trajectories])


def check(what: str, place: Path, acknowledged: list[int]) -> None:
    """What was acknowledged is there, nothing else but what was attempted, and a writer goes on."""
    try:
        held = json.loads(in_child(lambda: _held(place)) or "")
        third, status = collect(place, 20)
        after = json.loads(in_child(lambda: _held(place)) or "")
    except Violation as error:
        raise Violation(f"{what}: {error}") from error
    if not set(acknowledged) <= set(held) <= {*BEGUN, *range(10, 10 + STEP)} or len(set(held)) < len(held):
        raise Violation(f"{what}: {held} instead of {acknowledged}")
    # A commit that was claimed and could not be shown is gone on from: it was attempted.
    shown = after[len(held) : -STEP]
    if status or third != [20, 21, 22, 23] or after != held + shown + third or not {*shown} <= {*range(10, 10 + STEP)}:
        raise Violation(f"{what}: gone on with, {after} after {held} and {third}")


def begun(folder: Path) -> Path:
    """A store with four trajectories, to be copied; this process has then imported all that one needs."""
    Run(Disk())("arc")
    place = folder / "begun"
    if collect(place, 0) != (list(BEGUN), 0):
        raise Violation("a collector that nobody disturbs fails")
    return place


def sites() -> list[tuple[str, str, int]]:
    """Every call, what happens to it, and which of them it is."""
    found = []
    for call, (most, errors) in CALLS.items():
        for how in [*(f"error={name}" for name in errors), "signal=KILL"]:
            found += [(call, how, n) for n in range(1, most + 1)]
    return found


def strace(chosen: list[tuple[str, str, int]], count: int) -> Counter[str]:
    """Try sites until so many were reached."""
    counts: Counter[str] = Counter()
    with room() as folder:
        start = begun(folder)
        for number, (call, how, n) in enumerate(chosen):
            if counts["sites"] == count:
                break
            place, log = folder / str(number), folder / "strace.log"
            from_start = number % 3 > 0
            if from_start:
                shutil.copytree(start, place)
            for_good = number % 4 == 3 and how.startswith("error")
            inject = f"inject={call}:{how}:when={n}{'+' if for_good else ''}"
            tracer = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", inject]
            what = f"{inject}, {'a resumed store' if from_start else 'a new one'}"
            acknowledged, status = collect(place, 10, tracer)
            text = log.read_text()
            if "(INJECTED)" not in text and "killed by SIGKILL" not in text:
                counts["not reached"] += 1
                shutil.rmtree(place, ignore_errors=True)
                continue
            if status not in (0, -9):
                raise Violation(f"{what}: ended with {status}")
            check(what, place, [*(BEGUN if from_start else ()), *acknowledged])
            counts["sites"] += 1
            counts["killed" if status else "failed"] += 1
            shutil.rmtree(place)
    return counts


def full(limits: list[int]) -> Counter[str]:
    """No file may grow beyond a limit, as on a full disk (RLIMIT_FSIZE)."""
    counts: Counter[str] = Counter()
    with room() as folder:
        start = begun(folder)
        for number, limit in enumerate(limits):
            place = folder / str(number)
            from_start = number % 2 > 0
            if from_start:
                shutil.copytree(start, place)
            acknowledged, status = collect(place, 10, limit=limit)
            what = f"files of {limit} bytes at the most"
            if status:
                raise Violation(f"{what}: ended with {status}")
            check(what, place, [*(BEGUN if from_start else ()), *acknowledged])
            counts["sizes"] += 1
            counts["commits acknowledged"] += len(acknowledged)
            shutil.rmtree(place)
    return counts


def campaign(count: int, seed: int = 0) -> Counter[str]:
    """So many sites by strace."""
    return strace(random.Random(seed).sample(sites(), len(sites())), count)


def full_campaign(count: int, seed: int = 0) -> Counter[str]:
    """So many sizes of a full disk: each byte counts where metadata are written, in larger steps beyond."""
    draw = random.Random(seed)
    return full([draw.choice([draw.randrange(300), draw.randrange(8000)]) for _ in range(count)])


def alone(kind: str, count: int, seed: int) -> Counter[str]:
    """A campaign in a process that has done nothing else: forks of one that has threads may hang."""
    command = [sys.executable, "-m", "tests.campaign.calls", kind, str(count), str(seed)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode:
        raise Violation(done.stderr[-3000:])
    return Counter(json.loads(done.stdout))


KINDS: dict[str, Callable[[int, int], Counter[str]]] = {"strace": campaign, "full": full_campaign}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))))
