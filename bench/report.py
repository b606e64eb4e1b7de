"""What is kept and shown of a run: the table, the page, the JSON file."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from bench import data
from bench.remarks import REMARKS
from bench.rows import Claim, Ratio, second_thread

#: Modules of this package that enter rows, under the headings of the page, in its order.
GROUPS = {
    "Collecting": ("ingest", "commits", "record"),
    "Reading": ("reading", "lazy", "scaling"),
    "Files in and out": ("merge", "hdf5"),
    "Replay and training": ("replay",),
    "Checkpoints": ("checkpoint",),
}

_VERSIONS = "numpy numcodecs zarr tensorstore zarrs h5py torch torchrl dask".split()
_BEGIN, _END = "<!-- begin: python -m bench -->", "<!-- end -->"


@dataclass
class Report:
    """One run, or several one after another.

    rows : claims by the name of the row that made them. groups : of each row, its heading. seconds : of each row, on
        the clock and of processors, child processes included. skipped : rows that could not be measured, and why.
    profiles : of a work, shares by kind. profilers : what took its samples.
    """

    short: bool
    rows: dict[str, list[Claim]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    scaling: dict[str, Any] | None = None
    profiles: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    profilers: dict[str, str] = field(default_factory=dict)

    @property
    def claims(self) -> list[Claim]:
        return [claim for claims in self.rows.values() for claim in claims]

    def by_group(self) -> dict[str, list[tuple[str, Claim]]]:
        """Rows' names and claims under their headings."""
        found: dict[str, list[tuple[str, Claim]]] = {}
        for group in dict.fromkeys([*GROUPS, *self.groups.values()]):
            mine = [(name, c) for name, claims in self.rows.items() if self.groups[name] == group for c in claims]
            if mine:
                found[group] = mine
        return found

    def to_json(self) -> dict[str, Any]:
        rows = {name: [_claim_to_json(claim) for claim in claims] for name, claims in self.rows.items()}
        return {**vars(self), "rows": rows}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Report:
        rows = {name: [_claim_from_json(claim) for claim in claims] for name, claims in found["rows"].items()}
        return cls(**{**found, "rows": rows})


def _claim_to_json(claim: Claim) -> dict[str, Any]:
    values = {**vars(claim), "ratio": vars(claim.ratio), "cpu": vars(claim.cpu) if claim.cpu else None}
    return {**values, "peak": dict(claim.peak), "reached": claim.reached}


def _claim_from_json(found: Mapping[str, Any]) -> Claim:
    values = {name: value for name, value in found.items() if name != "reached"}
    cpu = Ratio(**found["cpu"]) if found["cpu"] else None
    return Claim(**{**values, "ratio": Ratio(**found["ratio"]), "cpu": cpu})


def versions() -> dict[str, str]:
    """What it is measured with, and how busy the machine is before."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    found["work of two threads"] = f"{second_thread():.2f}× one's"
    found["load before"] = f"{os.getloadavg()[0]:.1f}"
    found["sampled routes"] = str(len(data.sample()))
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def with_report(page: str, report: Report) -> str:
    """The page with what stands between its marks replaced by this report."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{markdown(report)}\n\n{_END}{rest.partition(_END)[2]}"


def markdown(report: Report) -> str:
    """Tables, profiles, and what limits each row that falls short."""
    barred = [claim for claim in report.claims if claim.bar]
    reached = sum(claim.reached is True for claim in barred)
    used = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    took = sum(seconds for seconds, _ in report.seconds.values()) / 60
    kind = "A short run" if report.short else "A full run"
    parts = [
        f"{kind}, {took:.0f} minutes: {reached} of {len(barred)} bars reached. Measured with {used}.",
        *(f"### {group}\n\n{table(c for _, c in claims)}" for group, claims in report.by_group().items()),
    ]
    if report.skipped:
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in report.skipped.items()) + ".")
    for name, shares in report.profiles.items():
        source = f"Samples of {report.profilers[name]}.\n\n" if name in report.profilers else ""
        parts.append(f"### Where the time goes: {name}\n\n{source}{_shares(shares)}")
    if fallen := _shortfalls(report):
        parts.append(f"### Bars that were not reached, and why\n\n{fallen}")
    return "\n\n".join(parts)


def _shortfalls(report: Report) -> str:
    """A bullet for each row: against whom it falls short, its ratios in the table's order, and the reason."""
    lines = []
    for name, claims in report.rows.items():
        ratios: dict[tuple[str, str], list[str]] = {}
        for claim in claims:
            if claim.reached is False:
                ratios.setdefault((claim.peer, _bar(claim)), []).append(f"{number(claim.ratio.median)}×")
        if ratios:
            short = "; ".join(f"{peer}: {', '.join(found)} of {bar}" for (peer, bar), found in ratios.items())
            lines.append(f"- **{name}** ({short}). {REMARKS.get(name, '')}".rstrip())
    return "\n".join(lines)


def _shares(profiles: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(dict.fromkeys(kind for shares in profiles.values() for kind in shares))
    lines = [["", *profiles], *([kind, *(f"{s.get(kind, 0):.0%}" for s in profiles.values())] for kind in kinds)]
    return _aligned(lines)


def line(claim: Claim) -> str:
    """One claim, for the terminal."""
    spread = f"[{number(claim.ratio.low)} … {number(claim.ratio.high)}]"
    verdict = {True: "reached", False: "SHORT", None: ""}[claim.reached]
    cpu = f" cpu {number(claim.cpu.median)}×" if claim.cpu else ""
    text = f"{claim.work} | {claim.peer} | {number(claim.ratio.median)}× {spread}{cpu} | {claim.bar or '—'} {verdict}"
    return text + (f" | {claim.note}" if claim.note else "")


def table(claims: Iterable[Claim]) -> str:
    """Claims as a Markdown table."""
    lines = [["work", "peer", "ratio", "spread", "CPU", "bar", "", "peak memory (ours / peer)", "note"]]
    for claim in claims:
        lines.append(
            [
                claim.work,
                claim.peer,
                f"{number(claim.ratio.median)}×" if claim.ratio.high else "0",
                f"{number(claim.ratio.low)} … {number(claim.ratio.high)}",
                f"{number(claim.cpu.median)}×" if claim.cpu else "",
                _bar(claim),
                {True: "reached", False: "**short**", None: ""}[claim.reached],
                " / ".join(f"{value / 2**20:.0f} MiB" for value in claim.peak.values()),
                claim.note,
            ]
        )
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _bar(claim: Claim) -> str:
    return claim.bar.replace(">=", "≥").replace("<=", "≤")


def number(value: float) -> str:
    """A ratio with as many digits as mean something."""
    digits = 0 if value >= 100 or not value else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}" if value >= 0.1 or not value else f"{value:.2g}"
