"""The tables of the report, as HTML. Everything that is not a tag is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape

from bench.page import table
from bench.paper.article import Cell
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.statistics import (
    Metric,
    Summary,
    best,
    best_scores,
    by_configuration,
    compare_families,
    families,
    plain,
    summaries,
    summary,
)

METRICS: tuple[Metric, Metric] = ("accuracy", "loss")
UNKNOWN = "-"
_DIGITS: dict[Metric, int] = {"accuracy": 2, "loss": 4}


def article_table(cells: Iterable[Cell]) -> str:
    """A row for each number of the article that has one of ours."""
    head = (
        "data", "family", "", "article", "ours", "n", "95 % interval", "difference",
        "in deviations", "our network",
    )  # fmt: skip
    rows = []
    for cell in cells:
        article, ours, run = cell.article, cell.ours, cell.run
        assert ours is not None
        assert run is not None
        digits = _DIGITS[article.metric]
        rows.append(
            (
                article.data,
                article.kind,
                article.metric,
                _plus_minus(article.mean, article.sd, digits),
                _plus_minus(ours.mean, ours.sd, digits),
                str(ours.n),
                _interval(ours, digits),
                _signed(cell.difference, digits),
                _signed(cell.deviations, 1),
                _size(run),
            )
        )
    return table(head, rows)


def best_table(results: Sequence[Result]) -> str:
    """A row for each family and metric, of the results of one data set."""
    own = plain(results)
    groups = by_configuration(own)
    rows = []
    for metric in METRICS:
        means, scores = summaries(own, metric), best_scores(results, metric)
        for kind, run in best(own, metric).items():
            mean, digits = means[run], _DIGITS[metric]
            rows.append(
                (
                    kind,
                    metric,
                    _plus_minus(mean.mean, mean.sd, digits),
                    str(mean.n),
                    _interval(mean, digits),
                    f"{groups[run][0].outcome.trainable_parameters:,}",
                    f"{scores[kind].mean:.3f}",
                    _size(run),
                )
            )
    head = "family", "", "mean", "n", "95 % interval", "parameters", "efficiency", "network"
    return table(head, rows)


def comparison_table(results: Sequence[Result]) -> str:
    """Welch's tests of all pairs of families, of the results of one data set."""
    rows = [
        (
            f"{one.a} and {one.b}",
            metric,
            _signed(one.difference, _DIGITS[metric]),
            f"{one.p:.2g}",
            f"{one.q:.2g}",
        )
        for metric in METRICS
        for one in compare_families(plain(results), metric)
    ]
    if not rows:
        return "<p>Two trials of two families are needed.</p>\n"
    note = "Welch's t-test between the best networks; q is p corrected by Benjamini and Hochberg."
    return f"<p class='note'>{escape(note)}</p>\n" + table(
        ("families", "", "difference", "p", "q"), rows
    )


def configuration_table(results: Sequence[Result]) -> str:
    """A row for each configuration, of the results of one data set."""
    accuracy, loss = (summaries(results, metric) for metric in METRICS)
    rows = [
        (
            run.kind,
            _size(run),
            _other(run),
            f"{trials[0].outcome.trainable_parameters:,}",
            str(len(trials)),
            _plus_minus(accuracy[run].mean, accuracy[run].sd, _DIGITS["accuracy"]),
            _plus_minus(loss[run].mean, loss[run].sd, _DIGITS["loss"]),
            _seconds(summary([trial.outcome.seconds for trial in trials]).mean),
        )
        for run, trials in by_configuration(results).items()
    ]
    head = "family", "network", "else", "parameters", "n", "accuracy (%)", "loss", "a run"
    return table(head, rows)


def cost_table(results: Sequence[Result]) -> str:
    """A row for each data set and family; seconds are those of training with validation."""
    rows = []
    for data in sorted({result.run.data for result in results}):
        for kind in families(r for r in results if r.run.data == data):
            own = [r.outcome.seconds for r in results if (r.run.data, r.run.kind) == (data, kind)]
            cells = str(len(own)), *map(_seconds, (min(own), sum(own) / len(own), max(own)))
            rows.append((data, kind, *cells, _seconds(sum(own))))
    return table(("data", "family", "runs", "least", "mean", "most", "all"), rows)


def _size(run: Run) -> str:
    return f"D={run.dendrites}, S={run.somas}, {run.epochs} epochs"


def _other(run: Run) -> str:
    """What differs from the article's protocol."""
    article = Run(run.data, run.kind, run.dendrites, run.somas, trial=run.trial, epochs=run.epochs)
    different = [name for name, value in asdict(run).items() if value != getattr(article, name)]
    return ", ".join(f"{name} {getattr(run, name)}" for name in different)


def _plus_minus(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _interval(of: Summary, digits: int) -> str:
    if of.low is None or of.high is None:
        return UNKNOWN
    return f"{of.low:.{digits}f} to {of.high:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:+.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
