"""A corpus for the parsers of bytes from disk; ``python -m tests.campaign.fuzz`` looks further."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.campaign import fuzz, share


def test_the_seeds_are_what_they_should_be() -> None:
    found = Counter(fuzz.one(data) for data in fuzz.seeds())
    assert found["accepted"] >= 35


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_mutants_are_refused_or_accepted(seed: int) -> None:
    found = Counter(fuzz.one(data) for data in islice(fuzz.mutants(4 * share.NUMBER + seed), 2500))
    share.count("fuzzing", {"inputs": sum(found.values())})
    assert set(found) <= {"accepted", "CorruptionError", "FormatError", "UnsupportedFormatError"}
    assert found["CorruptionError"] > 200


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x01{}", b"\x01[]", b'\x01{"attributes":{"trajstore":[]}}', b"\x02\xff"]
)
def test_small_inputs(data: bytes) -> None:
    assert fuzz.one(data) in ("CorruptionError", "FormatError", "accepted")
