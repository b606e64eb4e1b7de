"""Charts of what was measured, as PNG files."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from bench.rows import Claim

_REACHED, _SHORT, _PLAIN, _BAR = "#2a7f62", "#c8553d", "#8a8f98", "#222222"


def ratios(claims: list[Claim], path: str) -> None:
    """Each claim's ratio on a logarithmic axis, with its spread, and its bar as a mark."""
    shown = [claim for claim in claims if claim.ratio.median > 0]
    height = 0.27 * len(shown) + 1.2
    figure, axes = plt.subplots(figsize=(11, height), layout="constrained")
    places = np.arange(len(shown))[::-1]
    for place, claim in zip(places, shown):
        colour = {True: _REACHED, False: _SHORT, None: _PLAIN}[claim.reached]
        ratio = claim.ratio
        axes.barh(place, ratio.median, height=0.62, color=colour)
        axes.plot([max(ratio.low, 1e-3), ratio.high], [place, place], color=_BAR, linewidth=1)
        if claim.bar:
            axes.plot(max(float(claim.bar.split()[1]), 1e-3), place, marker="|", markersize=13, color=_BAR)
    axes.set_xscale("log")
    axes.axvline(1, color=_BAR, linewidth=0.6)
    axes.set_yticks(places, [f"{claim.work}  /  {claim.peer}" for claim in shown], fontsize=7)
    axes.set_ylim(-0.8, len(shown) - 0.2)
    axes.set_xlabel("ratio to the peer; the tick is what it was to reach (green: reached; red: not; grey: no bar)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scaling(found: dict[str, Any], path: str) -> None:
    """Seconds of each operation against the number of trajectories, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, seconds in found["seconds"].items():
        axes.plot(found["trajectories"], np.array(seconds) * 1e3, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("trajectories in the store")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
