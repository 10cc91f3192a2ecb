"""HTML report of `spartan adapt`: accuracy, size, speed, and memory parents by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spartan.adapters.specialization import Specialization
from spartan.commands.adapt.job import Adapted
from spartan.commands.pages import drawing
from spartan.commands.pages.rendering import write_rendered


def write_adapting_page(
    adapted: Sequence[Adapted], classes: Sequence[str], options: dict[str, object], path: Path
) -> None:
    """Write the page.

    Args:
        adapted: What each adapter reached.
        classes: Class names.
        options: Options of the command.
        path: File to write.

    Raises:
        FileError: It cannot be written.
    """
    heatmaps = [
        (f"{layer} of {one.name}", found, _heatmap(found, classes))
        for one in adapted
        for layer, found in one.specializations.items()
    ]
    write_rendered(
        path,
        "adapt/page.html.j2",
        adapted=adapted,
        losses=_losses(adapted),
        heatmaps=heatmaps,
        options=options,
        title=Path(str(options["out"])).resolve().name,
    )


def _losses(adapted: Sequence[Adapted]) -> str:
    def draw(axes: Axes) -> None:
        for i, one in enumerate(adapted):
            epochs = [row["epoch"] for row in one.rows]
            losses = [row["loss"] for row in one.rows]
            axes.plot(
                epochs,
                losses,
                "o-",
                color=drawing.color_of(i),
                markersize=3,
                label=drawing.label_of(one.name),
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return drawing.figure(draw, "epoch", "training loss", legend=len(adapted) > 1)


def _heatmap(found: Specialization, classes: Sequence[str]) -> str:
    """Draw how much more or less than on average each class reads of each parent."""
    shares = found.shares
    excess = (100 * (shares - shares.mean(0))).tolist()
    limit = max(0.1, max(abs(value) for row in excess for value in row))

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        image = axes.imshow(excess, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(shares.shape[1]))
        axes.set_yticks(range(len(classes)), classes)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
        bar.set_label("percentage points")

    return drawing.figure(draw, "parent", "", size=(7.6, 0.22 * len(classes) + 0.9))
