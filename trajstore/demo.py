"""The demonstration: a real collection is killed with SIGKILL again and again, and nothing acknowledged is lost.

``collect`` is all that a collector of one's own needs; what follows it kills it and looks at what is left.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import trajstore
from trajstore.errors import AlreadyExistsError, MissingDependencyError, NotFoundError, SchemaError, StateError
from trajstore.exporters.routes import export_routes
from trajstore.operations.verify import verify

ATARI, CLASSIC = "ALE/Breakout-v5", "CartPole-v1"
_MAX_STEPS = 300
_COMMIT_EVERY = 0.25  # seconds; a demonstration is short

#: Called with the title of a step, and what happened there.
Say = Callable[[str, str], None]


def collect(path: str, env: str, count: int, workers: int, acknowledged: Callable[[int], None]) -> None:
    """Collect one episode for each of the seeds ``0 .. count``, or what is missing of them.

    ``acknowledged`` is called with each seed as soon as its episode is durable.
    """
    envs = make_envs(env, workers)
    with trajstore.create(
        path,
        resume=True,
        target=count,
        unique="seed",
        config={"env": env, "policy": "uniform random", "max_steps": _MAX_STEPS},
        commit_every=_COMMIT_EVERY,
    ) as writer:
        told = writer.committed
        appended: list[int] = [-1] * told
        for episode, columns in play(envs, writer.remaining_seeds(range(count), count).tolist()):
            writer.append(episode, **columns)
            appended.append(columns["seed"])
            while told < writer.committed:
                acknowledged(appended[told])
                told += 1
    for seed in appended[told:]:
        acknowledged(seed)


def play(envs: Any, seeds: Sequence[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One episode for each seed, in the order in which they end; environment and policy depend on the seed alone."""
    waiting = deque(seeds)
    playing: dict[int, _Episode] = {}
    ended = np.ones(envs.num_envs, bool)
    while waiting or playing:
        if ended.any():
            starts = [0] * envs.num_envs
            for i in np.flatnonzero(ended).tolist():
                if waiting:
                    starts[i] = waiting.popleft()
                    playing[i] = _Episode(starts[i])
            obs, _ = envs.reset(seed=starts, options={"reset_mask": ended})
        actions = np.zeros(envs.num_envs, np.int64)
        for i, episode in playing.items():
            actions[i] = episode.policy.integers(envs.single_action_space.n)
        after, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
        for i, episode in list(playing.items()):
            episode.add(obs[i], actions[i], rewards[i])
            if ended[i]:
                yield playing.pop(i).finish(bool(terminated[i]))
        obs = after


class _Episode:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.policy = np.random.default_rng(seed)
        self.rows: tuple[list[Any], list[Any], list[Any]] = ([], [], [])

    def add(self, *row: Any) -> None:
        for rows, value in zip(self.rows, row):
            rows.append(value)

    def finish(self, terminated: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        obs, actions, rewards = map(np.array, self.rows)
        columns = {"seed": self.seed, "return": float(rewards.sum()), "ep_len": len(actions), "terminated": terminated}
        return {"obs": obs, "actions": actions, "rewards": rewards.astype(np.float32)}, columns


def make_envs(name: str, count: int) -> Any:
    """Vectorised environments, each reset by hand with a seed of its own. Raises ``MissingDependencyError``."""
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode, SyncVectorEnv
    except ImportError as error:
        hint = "pip install 'trajstore[demo]'"
        raise MissingDependencyError("the demo collects from Gymnasium environments", hint=hint) from error
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    options: dict[str, Any] = {"max_episode_steps": _MAX_STEPS}
    if name.startswith("ALE/"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)
        options["obs_type"] = "grayscale"
    try:
        envs = SyncVectorEnv([lambda: gymnasium.make(name, **options)] * count, autoreset_mode=AutoresetMode.DISABLED)
    except (gymnasium.error.Error, ImportError) as error:
        raise NotFoundError(f"there is no environment {name!r} here: {error}") from error
    if not isinstance(envs.single_action_space, gymnasium.spaces.Discrete):
        raise SchemaError(f"{name} has no discrete actions", hint=f"for example {CLASSIC}")
    return envs


def best_env() -> str:
    """Atari where it is installed, else a classic environment."""
    try:
        import ale_py  # noqa: F401
    except ImportError:
        return CLASSIC
    return ATARI


# -- what kills it, and looks at what is left --------------------------------------------------------------------------


@dataclass
class Kill:
    """One SIGKILL: episodes acknowledged by then, found in the store afterwards, and acknowledged ones not found."""

    seconds: float
    acknowledged: int
    found: int
    lost: int


@dataclass
class DemoReport:
    """What happened."""

    store: str
    env: str
    episodes: int
    steps: int = 0
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    skipped: int = 0
    compared: int = 0
    different: int = 0
    damaged: int = 0
    bytes_raw: int = 0
    bytes_disk: int = 0
    export: str = ""
    zarr_rows: int | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether everything that was acknowledged is there, once, as it was, and nothing is missing."""
        return not (self.lost or self.repeated or self.skipped or self.different or self.damaged)


def run(
    folder: str | None = None,
    *,
    env: str | None = None,
    episodes: int = 32,
    workers: int = 8,
    kills: int = 3,
    rerun: int = 6,
    seed: int | None = None,
    say: Say = lambda title, text: None,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> DemoReport:
    """Run the demonstration.

    Parameters
    ----------
    folder : a new folder for the store and the export; a temporary one by default. It is kept.
    env : a Gymnasium environment with discrete actions; Atari Breakout if ``ale-py`` is installed, else CartPole.
    episodes, workers : to collect, and environments side by side.
    kills : how many times the collector is killed; when is left to chance (``seed``).
    rerun : how many episodes are played again to compare them.
    say, counted : told of each step, and of episodes acknowledged so far.

    Raises
    ------
    MissingDependencyError, AlreadyExistsError, NotFoundError or SchemaError for the environment, and StateError if the
    collector itself fails.
    """
    began = time.monotonic()
    if env is not None:
        make_envs(env, 1).close()  # what is wrong with it is better said before anything is made
    env = env or best_env()
    chance = random.Random(seed)
    report = DemoReport(_new_folder(folder), env, episodes)
    command = [sys.executable, "-m", "trajstore.demo", report.store, env, str(episodes), str(workers)]
    log: set[int] = set()
    say("collect", f"{env}, {workers} environments side by side, one episode for each of the seeds 0..{episodes - 1}")
    say("", "an episode counts as acknowledged once a commit has made it durable; each new process resumes the store")
    for number in range(kills):
        _kill_once(command, report, log, episodes * (number + 1) // (kills + 1), chance, say, counted)
    _finish(command, log, episodes, counted)
    say("finish", f"the last process went on where the one before was killed, and collected up to {episodes} episodes")
    _check(report, log, say)
    _rerun(report, workers, min(rerun, episodes), chance, say)
    _slice(report, chance, say)
    _export(report, say)
    _plain_zarr(report, say)
    report.seconds = time.monotonic() - began
    return report


def _new_folder(folder: str | None) -> str:
    folder = folder or tempfile.mkdtemp(prefix="trajstore-demo-")
    if os.path.isdir(folder) and os.listdir(folder):
        raise AlreadyExistsError(f"{folder} is not empty", hint="give the demo a new folder")
    return os.path.join(os.path.abspath(folder), "run.zarr")


def _stored(path: str) -> list[int]:
    """The seeds in the store, in its order."""
    try:
        return [int(seed) for seed in trajstore.open(path).column("seed").tolist()]
    except LookupError:
        return []  # killed before it had one


def _kill_once(
    command: list[str],
    report: DemoReport,
    log: set[int],
    enough: int,
    chance: random.Random,
    say: Say,
    counted: Callable[[int, int], None],
) -> None:
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        for line in child.stdout:
            log.add(int(line))
            counted(len(log), report.episodes)
            if len(log) >= enough:
                time.sleep(chance.random() * 2 * _COMMIT_EVERY)
                break
    finally:
        child.kill()
        rest, _ = child.communicate()
    # What it said before it died counts as well; its last line may be torn.
    log.update(int(line) for line in rest.split(b"\n")[:-1])
    if child.returncode != -9 and len(log) < report.episodes:
        raise StateError(f"the collector ended by itself with status {child.returncode}")
    stored = set(_stored(report.store))
    kill = Kill(time.monotonic() - began, len(log), len(stored), len(log - stored))
    report.kills.append(kill)
    say(
        "kill -9",
        f"after {kill.seconds:.1f} s: {kill.acknowledged} episodes acknowledged, {kill.found} found in the store, "
        f"{kill.lost} lost",
    )


def _finish(command: list[str], log: set[int], episodes: int, counted: Callable[[int, int], None]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                log.add(int(line))
                counted(len(log), episodes)
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise StateError(f"the collector failed with status {child.returncode}")


def _check(report: DemoReport, log: set[int], say: Say) -> None:
    seeds = _stored(report.store)
    report.lost = len(log - set(seeds))
    report.repeated = len(seeds) - len(set(seeds))
    report.skipped = len(set(range(report.episodes)) - set(seeds))
    say("check", f"{len(seeds)} episodes: {report.lost} lost, {report.repeated} twice, {report.skipped} seeds skipped")
    found = verify(report.store).stores[0]
    report.damaged = len(found.damages)
    report.bytes_disk = found.bytes
    report.steps = found.steps
    say("", f"every checksum holds: {found.files} files, {found.chunks} chunks" if found.ok else "DAMAGED")


def _rerun(report: DemoReport, workers: int, count: int, chance: random.Random, say: Say) -> None:
    dataset = trajstore.open(report.store)
    row = {seed: number for number, seed in enumerate(dataset.column("seed").tolist())}
    chosen = sorted(chance.sample(sorted(row), min(count, len(row))))
    for episode, columns in play(make_envs(report.env, min(workers, max(count, 1))), chosen):
        stored = dataset[row[columns["seed"]]]
        same = all(np.array_equal(stored[name][:], rows) for name, rows in episode.items())
        report.different += not (same and all(stored[name] == value for name, value in columns.items()))
        report.compared += 1
    if report.compared:
        same_ones = report.compared - report.different
        say("", f"{same_ones} of {report.compared} episodes played again from their seeds are the same, bit for bit")


def _slice(report: DemoReport, chance: random.Random, say: Say) -> None:
    began = time.perf_counter()
    dataset = trajstore.open(report.store)
    opened = time.perf_counter() - began
    rows = [dataset.steps[name] for name in dataset.fields]
    report.bytes_raw = sum(each.dtype.itemsize * math.prod(each.shape) for each in rows)
    number = chance.randrange(len(dataset))
    middle = len(dataset[number]) // 2
    began = time.perf_counter()
    frames = dataset[number]["obs"][middle : middle + 4]
    sliced = time.perf_counter() - began
    best = f"return >= {float(dataset.table['return'].max()):g}"
    say("slice", f"ds = trajstore.open('run.zarr')          {opened * 1e3:.1f} ms, {len(dataset)} episodes")
    shown = f"ds[{number}]['obs'][{middle}:{middle + 4}]"
    say("", f"{shown:41}{sliced * 1e3:.1f} ms, {frames.shape} {frames.dtype}: reads these frames only")
    shown = f"ds.where('{best}')"
    say("", f"{shown:41}{len(dataset.where(best))} of {len(dataset)} episodes")


def _export(report: DemoReport, say: Say) -> None:
    report.export = os.path.join(os.path.dirname(report.store), "routes.npz")
    began = time.monotonic()
    count = export_routes(report.store, report.export).trajectories
    size = os.path.getsize(report.export)
    say("export", f"routes.npz with {count} routes in {time.monotonic() - began:.1f} s, {size / 1e6:.1f} MB")
    with np.load(report.export, allow_pickle=True) as file:  # the demo wrote it itself, a moment ago
        obs, seeds = file["routes_obs"], file["routes_seed"]
        same = np.array_equal(obs[0], trajstore.open(report.store)[0]["obs"][:]) and seeds.tolist() == _stored(
            report.store
        )
    report.different += not same
    say("", "np.load('routes.npz', allow_pickle=True) " + ("gives the same arrays" if same else "DIFFERS"))


def _plain_zarr(report: DemoReport, say: Say) -> None:
    try:
        import zarr
    except ImportError:
        say("zarr", "not installed here; `pip install zarr` (Python 3.11 or newer) opens the store without trajstore")
        return
    group: Any = zarr.open_group(report.store, mode="r")
    start, stop = group["clocks/steps"][0]
    rows = group["steps/obs"][start:stop]
    same = np.array_equal(rows, trajstore.open(report.store)[0]["obs"][:])
    report.zarr_rows, report.different = len(rows), report.different + (not same)
    say("zarr", f"zarr.open_group('run.zarr')['steps/obs'][{start}:{stop}] " + ("is the same" if same else "DIFFERS"))


def _acknowledge(seed: int) -> None:
    sys.stdout.write(f"{seed}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    collect(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), _acknowledge)
