"""Parameters needed to match the dense network, efficiency scores: the article's Fig. 3."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plots
from bench.paper.article import dense_target
from bench.paper.figures import style
from bench.paper.result import Result
from bench.paper.statistics import Metric, best_scores, families, parameters_to_match, plain

TITLE = "Parameter efficiency"
CAPTION = (
    "Parameters of the smallest trained network of each family that reaches the best vANN (a, b), "
    "and the efficiency score of the best network of each family (c: higher is better, d: lower is "
    "better), mean and standard deviation over trials."
)


@plots.styled
def draw(results: Sequence[Result]) -> Figure:
    """Of one data set; scores are relative to all of its results."""
    figure = Figure(figsize=(7.6, 6.2))
    panels = figure.subplots(2, 2)
    for metric, column in zip(style.METRICS, panels.T, strict=True):
        _matched(column[0], results, metric)
        _scores(column[1], results, metric)
    style.letters(panels.ravel())
    style.footnote(figure, style.absent(families(plain(results))))
    return figure


def seen(results: Sequence[Result]) -> str:
    """What the figure shows, in a sentence."""
    text = []
    for metric, choose in zip(style.METRICS, (max, min), strict=True):
        scores = best_scores(results, metric)
        if scores:
            kind = choose(scores, key=lambda k: scores[k].mean)
            text.append(f"{kind} has the best {metric} efficiency ({scores[kind].mean:.3g})")
        target = dense_target(results, metric)
        if target is None:
            continue
        matched = parameters_to_match(plain(results), metric, target.value)
        sizes = {k: n for k, n in matched.items() if n is not None and k != "vANN"}
        whose = "the best vANN" if target.ours else "the article's best vANN"
        if sizes:
            least = min(sizes, key=lambda k: sizes[k])
            dense = f" (it has {matched['vANN']:,})" if target.ours else ""
            text.append(
                f"{least} reaches the {metric} of {whose} with {sizes[least]:,} parameters{dense}"
            )
        else:
            text.append(f"no other family reaches the {metric} of {whose}")
    return f"{'; '.join(text)}." if text else "No network of the article's protocol was trained."


def _matched(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    target = dense_target(results, metric)
    if target is None:
        axes.set_title(f"size that matches vANN's {metric}")
        style.missing(axes, "no vANN was trained")
        return
    whose = "" if target.ours else "\n    (the article's)"
    axes.set_title(f"size that matches vANN's {metric}{whose}")
    matched = parameters_to_match(plain(results), metric, target.value)
    kinds = list(matched)
    for x, kind in enumerate(kinds):
        size, look = matched[kind], style.LOOKS[kind]
        if size is None:
            axes.text(
                x, 0.03, "not reached", rotation=90, ha="center", va="bottom", color=plots.MISSING,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            continue
        axes.plot(x, size, look.marker, color=look.color, ms=8)
        axes.annotate(
            f"{size:,}",
            (x, size),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            rotation=style.turn(kinds),
        )
    if any(matched.values()):
        axes.set(yscale="log", ylabel="trainable parameters")
        axes.margins(y=0.35)
    else:
        axes.set_yticks([])
    style.name_ticks(axes, kinds)


def _scores(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    axes.set_title(f"{metric} efficiency")
    scores = best_scores(results, metric)
    if scores:
        style.bars(axes, scores)
        axes.set(ylabel="score")
    else:
        style.missing(axes, "no networks of the article's protocol")
