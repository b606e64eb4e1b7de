"""Figures of a metrics history: the six panels that users know, or any metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajstore.checkpoint.folder import open_folder
from trajstore.checkpoint.retention import metric_names, metric_value
from trajstore.errors import MissingDependencyError, NotFoundError, UnsupportedFormatError
from trajstore.media.publish import ensure_folder, publish_file
from trajstore.media.storage import LocalStorage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[float], list[float]]

_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Episode reward", "reward", (("reward_mean", "mean"), ("episode_reward_mean", "mean"))),
    ("Reward by role", "reward", (("seeker_reward", "seeker"), ("hider_reward", "hider"))),
    ("Episode length", "steps", (("episode_len_mean", "mean"),)),
    ("KL divergence", "KL", (("seeker_kl", "seeker"), ("hider_kl", "hider"), ("kl", "policy"))),
    ("Entropy", "entropy", (("seeker_entropy", "seeker"), ("hider_entropy", "hider"), ("entropy", "policy"))),
)
_STEP_NAMES = ("iteration", "step", "training_iteration")
_MOST_PANELS = 12


def training_figure(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Six panels over the iterations: rewards, rewards by role, episode length, KL, entropy, latest values.

    Parameters
    ----------
    history : the metrics of each iteration; a key ``iteration`` or ``step`` is the x axis, else they count from 1.
        Metrics that are not there leave their panel empty, saying so.

    Raises
    ------
    MissingDependencyError : without matplotlib.
    """
    figure, panels = _figure(3, 2)
    figure.suptitle(title)
    for axes, (name, unit, lines) in zip(panels, _PANELS):
        drawn = [_draw(axes, series(history, metric), label) for metric, label in lines]
        _dress(axes, name, unit, sum(drawn), _steps_in(history))
        if name == "KL divergence" and any(drawn):
            values = [y for metric, _ in lines for y in series(history, metric)[1]]
            if values and 0 < 20 * min(values) < max(values):
                axes.set_yscale("log")
    _summarise(panels[5], history)
    return figure


def metrics_figure(history: Sequence[Mapping[str, Any]], metrics: Sequence[str], title: str = "") -> Figure:
    """One panel for each of ``metrics`` (nested ones by ``a/b``).

    Raises
    ------
    NotFoundError : a metric that no entry of the history has; it names those that there are.
    """
    for metric in metrics:
        if not series(history, metric)[0]:
            known = ", ".join(sorted(recorded(history))[:40])
            raise NotFoundError(f"no checkpoint has the metric {metric!r}", hint=f"there are {known}" if known else "")
    columns = 1 if len(metrics) == 1 else 2
    figure, panels = _figure(math.ceil(len(metrics) / columns), columns)
    figure.suptitle(title)
    for axes, metric in zip(panels, metrics):
        _dress(axes, metric, "", _draw(axes, series(history, metric), metric), _steps_in(history))
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    return figure


def folder_figure(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """The six usual panels where most of them have something to show, else one for each of the metrics there are.

    Of more than twelve metrics the first twelve; the title says so.
    """
    usual = sum(any(series(history, metric)[0] for metric, _ in lines) for _, _, lines in _PANELS)
    found = [name for name in recorded(history) if series(history, name)[0]]
    if 2 * usual > len(_PANELS) or not found:
        return training_figure(history, title)
    if len(found) > _MOST_PANELS:
        title = f"{title}: {_MOST_PANELS} of {len(found)} metrics, --metric draws others"
    return metrics_figure(history, found[:_MOST_PANELS], title)


def plot_folder(path: str | Path, target: str | Path, metrics: Sequence[str] = ()) -> str:
    """Plot a checkpoint folder's metrics history into a ``.png``, ``.svg`` or ``.pdf``; see :func:`folder_figure` for
    what is drawn by default.

    Raises ``NotFoundError`` without a history or for a metric it has not, ``UnsupportedFormatError`` for a suffix.
    """
    target = Path(target)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise UnsupportedFormatError(f"{target} has no suffix that is known here", hint=".png, .svg or .pdf")
    history = open_folder(path).history()
    if not history:
        raise NotFoundError(f"there is no metrics history in {path}", hint="checkpoints were saved without metrics")
    title = "/".join(Path(path).resolve().parts[-2:])
    figure = metrics_figure(history, metrics, title) if metrics else folder_figure(history, title)
    folder = LocalStorage(target.resolve().parent)
    ensure_folder(folder, "")
    publish_file(folder, target.name, [render(figure, target.suffix[1:])])
    return str(target)


def render(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a file: ``png``, ``svg`` or ``pdf``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110)
    return buffer.getvalue()


def series(history: Sequence[Mapping[str, Any]], metric: str) -> Series:
    """``(x, y)`` of the entries that have a finite value of a metric."""
    xs, ys = [], []
    for position, entry in enumerate(history, 1):
        value = metric_value(entry, metric)
        if value is not None and math.isfinite(value):
            at = next((metric_value(entry, name) for name in _STEP_NAMES if name in entry), None)
            xs.append(float(position) if at is None else at)
            ys.append(value)
    return xs, ys


def recorded(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all metrics in a history, nested ones as ``a/b``, without the steps, in the order of coming."""
    found = dict.fromkeys(name for entry in history for name in metric_names(entry))
    return [name for name in found if name not in _STEP_NAMES]


def _figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib", hint="pip install matplotlib") from error
    # Not pyplot: it keeps figures and may look for a screen.
    figure = MatplotlibFigure(figsize=(6.5 * columns, 3.2 * rows))
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _draw(axes: Axes, line: Series, label: str) -> bool:
    if line[0]:
        axes.plot(*line, label=label, marker="o" if len(line[0]) < 60 else None, markersize=2.5, linewidth=1.4)
    return bool(line[0])


def _dress(axes: Axes, title: str, unit: str, lines: int, unit_of_steps: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(unit_of_steps)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2.5M
    if lines > 1:
        axes.legend(edgecolor="none", framealpha=0.7)
    if not lines:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="0.5")


def _steps_in(history: Sequence[Mapping[str, Any]]) -> str:
    """What the x axis counts: see :func:`series`."""
    name = next((name for name in _STEP_NAMES if any(name in entry for entry in history)), "iteration")
    return name.rpartition("_")[2]


def _summarise(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    axes.axis("off")
    axes.set_title("Latest", fontsize=11, loc="left")
    latest = history[-1] if history else {}
    lines = []
    for name in recorded(history[-1:])[:14]:
        value = metric_value(latest, name)
        if value is None:
            continue
        recent = series(history[-20:], name)[1]
        mean = f"{math.fsum(recent) / len(recent):12.4g}" if recent else " " * 12
        shown = f"{value:12,.0f}" if abs(value) >= 1000 else f"{value:12.4g}"
        lines.append(f"{name[:24]:24s} {shown} {mean}")
    head = f"{'':24s} {'latest':>12s} {'mean of 20':>12s}"
    axes.text(0.0, 0.95, "\n".join([head, *lines]), family="monospace", fontsize=9, va="top", transform=axes.transAxes)
