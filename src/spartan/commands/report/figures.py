"""The pictures of a report on runs, as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes

from spartan.commands.pages.drawing import color_of, figure, label_of
from spartan.commands.runs.facts import LayerFacts, RunFacts
from spartan.errors import printable


def accuracy(runs: Sequence[RunFacts]) -> str:
    """Draw held-out (solid) and training (faint) accuracy over epochs, of training runs."""

    def draw(axes: Axes) -> None:
        _curves(axes, runs, "test", "accuracy", scale=100)
        _curves(axes, runs, "train", "accuracy", scale=100, faint=True)

    return figure(draw, "epoch", "accuracy, %", legend=len(runs) > 1)


def loss(runs: Sequence[RunFacts]) -> str:
    """Draw held-out (solid) and training (faint) loss over epochs.

    Of compressions: divergence from the dense network on calibration samples.
    """

    def draw(axes: Axes) -> None:
        colors = _colors(runs)
        for run, color in zip(runs, colors, strict=True):
            held_out = ("test", "loss") if run.compression is None else ("train", "held_out")
            _curve(axes, run, color, *held_out)
            _curve(axes, run, color, "train", "loss", faint=True)

    return figure(draw, "epoch", "loss", legend=len(runs) > 1)


def schedule(runs: Sequence[RunFacts]) -> str:
    """Draw density (solid, left) and β (dashed, right).

    Faint: the expected density of gates, and what growth methods have ever tried.
    """

    def draw(axes: Axes) -> None:
        _curves(axes, runs, "train", "expected", scale=100, faint=True)
        _curves(axes, runs, "train", "tried", scale=100, faint=True)
        _curves(axes, runs, "train", "density", scale=100)
        if any(run.series("train", "beta")[0] for run in runs):
            right = axes.twinx()
            for run, color in zip(runs, _colors(runs), strict=True):
                right.plot(*run.series("train", "beta"), "--", color=color, linewidth=1.2)
            right.set_ylabel("β, per unit of score (dashed)")
            right.set_ylim(bottom=0)
            right.spines["top"].set_visible(False)

    return figure(draw, "epoch", "density, %", legend=len(runs) > 1, log=True)


def churn(runs: Sequence[RunFacts]) -> str:
    """Draw the share of units whose mask changed since the row before."""

    def draw(axes: Axes) -> None:
        _curves(axes, runs, "train", "churn", scale=100)
        axes.set_ylim(bottom=0)

    return figure(draw, "epoch", "units that changed, %", legend=len(runs) > 1)


def densities(runs: Sequence[RunFacts]) -> str:
    """Draw the density of each layer, bars side by side for several runs."""
    return _layers(runs, lambda layer: 100 * layer.density, "density, %")


def errors(runs: Sequence[RunFacts]) -> str:
    """Draw the reconstruction error of each layer that has one, in percent."""
    return _layers(runs, lambda x: None if x.error is None else 100 * x.error, "error, %")


def _layers(
    runs: Sequence[RunFacts], value_of: Callable[[LayerFacts], float | None], label: str
) -> str:
    names = list(dict.fromkeys(layer.name for run in runs for layer in run.layers))
    height = 0.8 / len(runs)

    def draw(axes: Axes) -> None:
        for i, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
            found = {layer.name: value_of(layer) for layer in run.layers}
            offset = (i - (len(runs) - 1) / 2) * height
            values = [(k, found.get(name)) for k, name in enumerate(names)]
            bars = [(k + offset, value) for k, value in values if value is not None]
            axes.barh(
                [b[0] for b in bars],
                [b[1] for b in bars],
                height,
                color=color,
                label=label_of(run.name),
            )
        axes.set_yticks(range(len(names)), [printable(name) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)

    size = (7.6, max(2.0, 0.24 * len(names) * max(1.0, 0.7 * len(runs)) + 0.8))
    return figure(draw, label, "", legend=len(runs) > 1, size=size)


def histograms(run: RunFacts) -> str:
    """Draw the distribution of the nonzero weights of each layer, one row each."""
    shown = [layer for layer in run.layers if layer.nonzero > 0]
    peak = max(float(run.tensors[layer.name].abs().max()) for layer in shown) if shown else 1.0

    def draw(axes: Axes) -> None:
        edges = torch.linspace(-peak, peak, 81)
        for i, layer in enumerate(shown):
            values = run.tensors[layer.name].float()
            counts = torch.histogram(values[values != 0], edges).hist
            heights = (0.9 * counts / counts.max().clamp(min=1)).tolist()
            base = len(shown) - 1 - i
            tops = [base + h for h in heights]
            axes.fill_between(edges[:-1].tolist(), base, tops, step="post", color=color_of(0),
                              alpha=0.75, linewidth=0)  # fmt: skip
        axes.set_yticks(
            [len(shown) - 1 - i for i in range(len(shown))],
            [printable(layer.name) for layer in shown],
            fontsize=8,
        )
        axes.set_ylim(-0.15, len(shown) + 0.05)

    size = (7.6, max(2.0, 0.27 * len(shown) + 0.8))
    return figure(draw, "weight (nonzero ones)", "", size=size)


def _curves(
    axes: Axes,
    runs: Sequence[RunFacts],
    split: str,
    key: str,
    scale: float = 1.0,
    faint: bool = False,
) -> None:
    for run, color in zip(runs, _colors(runs), strict=True):
        # Of compressions, only the dense network and the result are tested: no curve.
        if split == "train" or run.compression is None:
            _curve(axes, run, color, split, key, scale, faint)


def _curve(
    axes: Axes,
    run: RunFacts,
    color: str,
    split: str,
    key: str,
    scale: float = 1.0,
    faint: bool = False,
) -> None:
    epochs, values = run.series(split, key)
    if not epochs:
        return
    few = not faint and len(epochs) < 30 and key != "density"
    axes.plot(
        epochs,
        [scale * value for value in values],
        color=color,
        alpha=0.3 if faint else 1.0,
        linewidth=1.0 if faint else 1.8,
        marker="o" if few else None,
        markersize=3,
        label=None if faint else label_of(run.name),
    )


def _colors(runs: Sequence[RunFacts]) -> list[str]:
    return [color_of(i) for i in range(len(runs))]
