"""Charts of what was measured, as PNG files."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report import Report, number
from bench.rows import Claim

_REACHED, _SHORT, _INK, _PALE = "#2a7f62", "#c8553d", "#222222", "#9aa0a8"
_LEAST, _MOST = 0.05, 2000.0  # what lies beyond is cut off, and has its number all the same


def ratios(report: Report, path: str) -> None:
    """Every claim that has a bar: how many times better than its peer, where it had to come, and the spread."""
    groups = [
        (group, [claim for _, claim in claims if claim.bar and claim.ratio.high > 0])
        for group, claims in report.by_group().items()
    ]
    groups = [(group, claims) for group, claims in groups if claims]
    count = sum(len(claims) + 1.4 for _, claims in groups)
    figure, axes = plt.subplots(figsize=(12, 0.235 * count + 1.3), layout="constrained")
    place = 0.0
    places, labels = [], []
    for group, claims in groups:
        place += 1.4
        axes.text(_LEAST, place - 0.75, group, fontsize=10, fontweight="bold", va="center", clip_on=False)
        for claim in claims:
            _draw(axes, place, claim)
            places.append(place)
            labels.append(f"{_cut(claim.work, 66)}  /  {_cut(claim.peer, 42)}")
            place += 1
    axes.set_xscale("log")
    axes.set_xlim(_LEAST, _MOST * 2.2)
    axes.axvline(1, color=_INK, linewidth=0.7)
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.set_ylim(place, -0.2)
    ticks = [0.1, 1, 10, 100, 1000]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("times better than the peer (for a cost: the peer's over ours); logarithmic")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Patch(color=_REACHED, label="bar reached"),
        Patch(color=_SHORT, label="short of it"),
        Line2D([], [], color=_INK, marker="|", linestyle="", markersize=11, markeredgewidth=2, label="the bar"),
        Line2D([], [], color=_PALE, linewidth=1.5, label="lowest to highest round"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw(axes: Any, place: float, claim: Claim) -> None:
    cost = claim.bar.startswith("<=")
    values = [claim.ratio.median, claim.ratio.low, claim.ratio.high, float(claim.bar.split()[1])]
    better, low, high, bar = (_clip(1 / value if cost and value else value) for value in values)
    colour = _REACHED if claim.reached else _SHORT
    axes.barh(place, better - 1, left=1, height=0.62, color=colour)
    axes.plot([low, high], [place, place], color=_PALE, linewidth=1.5)
    axes.plot(bar, place, marker="|", markersize=9, markeredgewidth=2, color=_INK)
    text = f"{number(claim.ratio.median)}× {'of its cost' if cost else ''}".rstrip()
    axes.text(max(better, bar, low, high, 1) * 1.12, place, text, fontsize=7, va="center", color=colour)


def _clip(value: float) -> float:
    return min(max(value, _LEAST), _MOST)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def scaling(found: dict[str, Any], path: str) -> None:
    """Seconds of each operation against the numbers of trajectories and of fields, both axes logarithmic."""
    figure, both = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, (what, label) in zip(both, (("trajectories", "trajectories in the store"), ("fields", "fields"))):
        for name, seconds in found[what]["seconds"].items():
            axes.plot(found[what]["counts"], np.array(seconds) * 1e3, marker="o", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("milliseconds")
    both[1].yaxis.set_tick_params(labelleft=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
