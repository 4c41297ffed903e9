"""Turns the two trainings of the demo into a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

import dendrite_kernels as dk
from bench.paper.datasets import ImageData
from bench.paper.measured import Measured
from bench.paper.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0b5fa5", "#f0b67f")  # sparse, masked dense
DRAWN_SOMAS = 4


def ratios(sparse: Measured, twin: Measured) -> dict[str, float | None]:
    """Quantities of the masked-dense twin divided by those of the sparse network."""
    quantities = {
        "stored_parameters": (sparse.outcome.dense_parameters, twin.outcome.dense_parameters),
        "step_ms": (sparse.steps.percentiles().get("p50"), twin.steps.percentiles().get("p50")),
        "peak_memory": (sparse.peak_memory_mib, twin.peak_memory_mib),
        "seconds": (sparse.outcome.seconds, twin.outcome.seconds),
    }
    return {name: b / a if a and b else None for name, (a, b) in quantities.items()}


def print_table(kind: str, sparse: Measured, twin: Measured) -> None:
    ratio = ratios(sparse, twin)

    def row(label: str, cell: Callable[[Measured], str], ratio_name: str = "") -> tuple[str, ...]:
        value = ratio.get(ratio_name)
        return label, cell(sparse), cell(twin), f"{value:.1f}x" if value else ""

    rows = [
        row("test accuracy", lambda m: f"{m.outcome.history['test_accuracy'][-1]:.2%}"),
        row("test loss", lambda m: f"{m.outcome.history['test_loss'][-1]:.4f}"),
        row("trainable parameters", lambda m: f"{m.outcome.trainable_parameters:,}"),
        row("stored parameters", lambda m: f"{m.outcome.dense_parameters:,}", "stored_parameters"),
        row("ms per training step (median)", lambda m: _step(m, "p50"), "step_ms"),
        row(
            "from the 20th to the 80th percentile",
            lambda m: f"{_step(m, 'p20')} to {_step(m, 'p80')}",
        ),
        row("peak memory of training", lambda m: _mib(m.peak_memory_mib), "peak_memory"),
        row("whole training with evaluation", lambda m: f"{m.outcome.seconds:.1f} s", "seconds"),
    ]
    head = "", kind, "masked dense", "ratio"
    aligned = "left", "right", "right", "right"
    print(f"\n{tabulate(rows, head, 'simple', disable_numparse=True, colalign=aligned)}\n")


def _step(measured: Measured, percentile: str) -> str:
    value = measured.steps.percentiles().get(percentile)
    return "-" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f} MiB"


def draw(path: Path, data: ImageData, run: Run, sparse: Measured, twin: Measured) -> None:
    """Learning curves, time, memory, and receptive fields of a few somas over the mean image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained", dpi=130)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1), squeeze=False).ravel()
    loss, accuracy, time, memory = top.subplots(1, 4, width_ratios=(2, 2, 1, 1))
    both = {run.kind: sparse, "masked dense": twin}
    _curves(loss, both, "train_loss", 1, "training loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    _curves(accuracy, both, "test_accuracy", 100, "test accuracy (%)")
    step_ms = [m.steps.percentiles().get("p50") for m in (sparse, twin)]
    _bars(time, list(both), step_ms, "ms per step")
    peaks = [m.peak_memory_mib for m in (sparse, twin)]
    _bars(memory, list(both), peaks, "peak MiB")
    top.suptitle(
        f"{data.name}: {run.kind} with {run.somas} somas x {run.dendrites} dendrites "
        f"x {run.synapses} synapses, and its masked-dense twin"
    )
    layer = next(m for m in run.build(data).modules() if isinstance(m, dk.DendriticLayer))
    c, shape = layer.connectivity, (*data.in_shape, data.channels)
    fields = dk.Connectivity(c.crow_indices, c.col_indices, c.soma_ptr, c.in_features, shape)
    mean_image = data.x_train.mean(0).reshape(shape)
    fields.plot(range(min(DRAWN_SOMAS, c.num_somas)), image=mean_image, figure=bottom)
    bottom.suptitle("Inputs of a few somas, a colour for each dendrite, over the mean image")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curves(axes: Axes, both: dict[str, Measured], key: str, scale: float, title: str) -> None:
    """The curve of the twin is wide, so that both are visible where they agree."""
    from matplotlib.ticker import MaxNLocator

    widths = (1.4, 5.0)
    for (label, measured), color, width in zip(both.items(), COLORS, widths, strict=True):
        values = [scale * value for value in measured.outcome.history[key]]
        epochs, marker = range(1, len(values) + 1), "o" if len(values) < 6 else None
        axes.plot(epochs, values, c=color, lw=width, marker=marker, label=label, zorder=-width)
    axes.set(xlabel="epoch", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, names: list[str], values: list[float | None], title: str) -> None:
    bars = axes.bar(
        [name.replace(" ", "\n") for name in names], [v or 0.0 for v in values], color=COLORS
    )
    labels = ["not known" if value is None else f"{value:.3g}" for value in values]
    if values[0] and values[1]:
        labels[1] += f"\n({values[1] / values[0]:.1f}x)"
    axes.bar_label(bars, labels, padding=2)
    axes.margins(y=0.25)
    axes.set(title=title, yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
