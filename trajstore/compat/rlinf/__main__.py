"""``python -m trajstore.compat.rlinf``: merge the ranks of a buffer, split one, or load and sample one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trajstore.errors import TrajstoreError
from trajstore.rlinf import merge_folders, split_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. Without ``merge`` or ``split``, ``--split-count`` tells which it is."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word.startswith("--load-path") for word in words):
        buffer = importlib.import_module("trajstore.compat.rlinf.buffer")
        return int(buffer.main(words) or 0)
    action = words.pop(0) if words[:1] in (["merge"], ["split"]) else ""
    given = _parser(action).parse_args(words)
    if action == "split" and given.split_count is None:
        _parser(action).error("--split-count is needed to split")
    if action == "merge" and given.split_count is not None:
        _parser(action).error("--split-count is for split")
    progress = _progress() if sys.stderr.isatty() else None
    try:
        if given.split_count is None:
            done = merge_folders(given.source_path, given.save_path, copy=given.copy, report=progress)
        else:
            done = split_folder(given.source_path, given.save_path, given.split_count, copy=given.copy, report=progress)
    except TrajstoreError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    for place, ids in done.missing.items():
        shown = ", ".join(map(str, ids))
        print(f"warning: {place} names files that are not there, left out: {shown}", file=sys.stderr)
    verb = "moved" if done.moved else "copied"
    print(f"{verb} {done.trajectories} trajectories, {done.samples} samples to {done.destination}")
    return 0


def _parser(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m trajstore.compat.rlinf {action}".rstrip(),
        description="Merge the rank_* folders of a replay buffer into one, or split off the first trajectories of one. "
        "The folder appears whole or not at all; a move that is killed goes on when it is run again.",
    )
    parser.add_argument("--source-path", default=".", help="folder of rank_* folders, or one buffer folder to split")
    parser.add_argument("--save-path", required=True, help="the new folder; there must be nothing yet")
    parser.add_argument("--split-count", type=int, help="split off so many trajectories, instead of merging ranks")
    parser.add_argument("--copy", action="store_true", help="leave the source as it is, instead of moving its files")
    return parser


def _progress() -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        end: Any = "\n" if done == total else ""
        print(f"\r{done}/{total}", end=end, file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
