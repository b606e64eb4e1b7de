"""What one run of the tests does of the campaigns, and where it writes down what it did.

A campaign in the tests is cut into thirds. ``TRAJSTORE_SHARE`` (``1``, ``2`` or ``3``; ``1`` if left out) says which of
them this run carries out: ``.ci/run`` gives each of its jobs another one, so that all of them are done once.
``TRAJSTORE_COUNTS`` names a file to which each harness adds a line of counts;
``python -m tests.campaign.share FILE...`` prints their sums.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

SHARES = 3
NUMBER = int(os.environ.get("TRAJSTORE_SHARE") or 1) - 1
assert 0 <= NUMBER < SHARES, "TRAJSTORE_SHARE is 1, 2 or 3"

T = TypeVar("T")


def mine(everything: Sequence[T]) -> Sequence[T]:
    """This run's third of what is to be done, in order."""
    return everything[NUMBER::SHARES]


def count(harness: str, counts: Mapping[str, int]) -> None:
    """Print what a harness did, and write it down."""
    print(harness, dict(counts))
    file = os.environ.get("TRAJSTORE_COUNTS")
    if file:
        with open(file, "a") as log:  # one short write: the lines of several processes do not mix
            log.write(json.dumps([harness, dict(counts)]) + "\n")


def total(files: Sequence[str]) -> dict[str, Counter[str]]:
    """The sums of all lines, by harness."""
    sums: dict[str, Counter[str]] = {}
    for name in files:
        with open(name) as file:
            for line in file:
                harness, counts = json.loads(line)
                sums.setdefault(harness, Counter()).update(counts)
    return sums


def main() -> None:
    for harness, counts in sorted(total(sys.argv[1:]).items()):
        said = ", ".join(
            f"{number:,} {what}" if number < 10**9 else f"{number:.2g} {what}" for what, number in counts.items()
        )
        print(f"{harness:16} {said}")


if __name__ == "__main__":
    main()
