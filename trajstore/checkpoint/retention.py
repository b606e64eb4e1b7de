"""Which checkpoints stay, and why: the union of a few rules, computed anew from what is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajstore.errors import SchemaError

Best = tuple[str, str, int]
"""(metric, ``"max"`` or ``"min"``, how many)."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as retention sees it: ``order`` sorts by age, the newest last."""

    name: str
    step: int
    order: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)
    pinned: bool = False


@dataclass(frozen=True)
class Retention:
    """The rules. A checkpoint stays if any of them keeps it; with no rule at all, everything stays.

    keep_last : the newest so many. keep_best : (metric, mode, n), or several of them.
    keep_every : of the checkpoints at or after each multiple of so many steps the first, and that of step 0.
    keep : exactly these steps.
    """

    keep_last: int | None = None
    keep_best: Best | Sequence[Best] = ()
    keep_every: int | None = None
    keep: Sequence[int] = ()

    def __post_init__(self) -> None:
        for rule in self.best_rules:
            if len(rule) != 3 or rule[1] not in ("max", "min") or not isinstance(rule[2], int) or rule[2] < 0:
                raise SchemaError(f"keep_best is {rule!r}", hint='write it as ("reward_mean", "max", 2)')
        if self.keep_last is not None and self.keep_last < 1:
            raise SchemaError(f"keep_last is {self.keep_last}", hint="1 or more; None keeps all")
        if self.keep_every is not None and self.keep_every < 1:
            raise SchemaError(f"keep_every is {self.keep_every}", hint="a number of steps, or None")

    @property
    def best_rules(self) -> tuple[Best, ...]:
        """The ``keep_best`` rules, also where only one was given."""
        best: Any = self.keep_best
        return (best,) if best and isinstance(best[0], str) else tuple(best or ())

    @property
    def keeps_all(self) -> bool:
        return self.keep_last is None and not self.best_rules and self.keep_every is None and not self.keep


def select(candidates: Iterable[Candidate], rules: Retention, newest_valid: str | None = None) -> dict[str, list[str]]:
    """``{name: reasons}`` of the candidates that stay.

    ``newest_valid`` names the newest one that verifies; without it the newest is taken for it. It always stays.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.order)
    kept: dict[str, list[str]] = {}

    def keep(candidate: Candidate, reason: str) -> None:
        kept.setdefault(candidate.name, []).append(reason)

    for candidate in ordered:
        if candidate.pinned:
            keep(candidate, "pinned")
    if rules.keeps_all:
        for candidate in ordered:
            keep(candidate, "all")
    if rules.keep_last is not None:
        for candidate in ordered[-rules.keep_last :]:
            keep(candidate, "last")
    for metric, mode, count in rules.best_rules:
        for candidate in ranked(ordered, metric, mode)[:count]:
            keep(candidate, f"best {metric}")
    if rules.keep_every is not None:
        for candidate in _milestones(ordered, rules.keep_every):
            keep(candidate, "every")
    wanted = set(rules.keep)
    for candidate in ordered:
        if candidate.step in wanted:
            keep(candidate, "asked")
    for candidate in ordered[-1:] if newest_valid is None else ordered:
        if candidate.name == (newest_valid or candidate.name) and candidate.name not in kept:
            keep(candidate, "newest")
    return kept


def ranked(candidates: Sequence[Candidate], metric: str, mode: str) -> list[Candidate]:
    """The candidates that have the metric, best first, the newer of two equals first; NaN comes last of all."""
    known = [(metric_value(candidate.metrics, metric), candidate) for candidate in candidates]
    sign = -1.0 if mode == "max" else 1.0
    scored = [
        (math.isnan(value), 0.0 if math.isnan(value) else sign * value, -position, candidate)
        for position, (value, candidate) in enumerate(known)
        if value is not None
    ]
    return [candidate for *_, candidate in sorted(scored, key=lambda item: item[:3])]


def metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric by name; ``a/b`` and ``a.b`` also find it nested. ``None`` if it is not there or is no number."""
    value: Any = _lookup(metrics, name)
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def metric_names(metrics: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The numbers in a metrics mapping, nested ones as ``a/b``."""
    found: list[str] = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += metric_names(value, f"{prefix}{key}/")
        elif metric_value({"": value}, "") is not None:
            found.append(f"{prefix}{key}")
    return found


def _lookup(metrics: Mapping[str, Any], name: str) -> Any:
    if name in metrics:
        return metrics[name]
    for position, character in enumerate(name):
        if character in "/.":
            inner = metrics.get(name[:position])
            if isinstance(inner, Mapping):
                found = _lookup(inner, name[position + 1 :])
                if found is not None:
                    return found
    return None


def _milestones(ordered: Sequence[Candidate], every: int) -> list[Candidate]:
    first: dict[int, Candidate] = {}
    for candidate in ordered:
        bucket = candidate.step // every
        if (bucket or candidate.step == 0) and (bucket not in first or candidate.step < first[bucket].step):
            first[bucket] = candidate
    return list(first.values())
