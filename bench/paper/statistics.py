"""Statistics of trained networks: trials, families, efficiency. Pure functions of results.

A configuration is a run without its trial: the run with trial 0 stands for it.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, section 9.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import inf, isfinite, isnan, log10, sqrt
from typing import Any, Literal, get_args

import numpy as np
from scipy import stats

import dendrite_kernels as dk
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.training import lowest

Metric = Literal["accuracy", "loss"]
FAMILIES: tuple[dk.models.Kind, ...] = get_args(dk.models.Kind)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean over n trials; of one trial alone, deviation and interval are not known."""

    mean: float
    sd: float | None
    n: int
    low: float | None = None  # confidence interval of the mean, by Student's t
    high: float | None = None


def value(result: Result, metric: Metric) -> float:
    """On the test set: accuracy in percent, or mean loss; after a training that diverged, inf."""
    outcome = result.outcome
    if metric == "accuracy":
        return 100 * outcome.test_accuracy
    return inf if isnan(outcome.test_loss) else outcome.test_loss


def better(metric: Metric, a: float, b: float) -> bool:
    return a > b if metric == "accuracy" else a < b


def data_name(data: str) -> str:
    """As the article calls it: emnist for emnist-balanced."""
    return "emnist" if data == "emnist-balanced" else data


def summary(values: Sequence[float]) -> Summary:
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Summary(mean, None, n)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / sqrt(n)
    return Summary(mean, sd, n, mean - half, mean + half)


def configuration(run: Run) -> Run:
    return replace(run, trial=0)


def by_configuration(results: Iterable[Result]) -> dict[Run, list[Result]]:
    """The trials of each configuration, families in the order of `dk.models`, small ones first."""
    groups: defaultdict[Run, list[Result]] = defaultdict(list)
    for result in sorted(results, key=_order):
        groups[configuration(result.run)].append(result)
    return dict(groups)


def _order(result: Result) -> tuple[Any, ...]:
    run = result.run
    family, size = FAMILIES.index(run.kind), result.outcome.trainable_parameters
    return run.data, family, size, run.key


def summaries(results: Iterable[Result], metric: Metric) -> dict[Run, Summary]:
    """Of every configuration."""
    return {
        run: summary([value(trial, metric) for trial in trials])
        for run, trials in by_configuration(results).items()
    }


def families(results: Iterable[Result]) -> list[dk.models.Kind]:
    """Those that the results have, in the order of `dk.models`."""
    found = {result.run.kind for result in results}
    return [kind for kind in FAMILIES if kind in found]


def plain(results: Iterable[Result]) -> list[Result]:
    """Those of the article's protocol: one layer, no noise, no dropout, and so on."""
    return [r for r in results if _is_plain(r.run)]


def sequential(results: Iterable[Result]) -> list[Result]:
    """Those of the article's protocol but for the order of the classes."""
    return [
        r
        for r in results
        if r.run.task == "sequential" and _is_plain(replace(r.run, task="shuffled"))
    ]


def _is_plain(run: Run) -> bool:
    """Whatever the size, trial and number of epochs are."""
    article = Run(run.data, run.kind, run.dendrites, run.somas, trial=run.trial, epochs=run.epochs)
    return run == article


def best(results: Iterable[Result], metric: Metric) -> dict[dk.models.Kind, Run]:
    """The configuration of each family with the best mean on the test set, as the article does it.

    A single trial is the best only where there are no others: the best of many is so by luck. The
    results must be of one data set. A mean that is not finite is never the best.
    """
    means = {run: mean for run, mean in summaries(results, metric).items() if isfinite(mean.mean)}
    sign = 1 if metric == "accuracy" else -1
    found: dict[dk.models.Kind, Run] = {}
    for run in sorted(means, key=lambda run: (means[run].n > 1, sign * means[run].mean)):
        found[run.kind] = run
    return {kind: found[kind] for kind in FAMILIES if kind in found}


def efficiency(results: Sequence[Result], metric: Metric) -> list[float]:
    """The efficiency score of each result; a high accuracy score and a low loss score are good.

    k = parameters * epochs until the least validation loss; f = log10 k / the least log10 k of all
    results of the data set; scores are accuracy / f and loss * f, the accuracy a fraction.
    """
    logs = [log10(_cost(result)) for result in results]
    least: dict[str, float] = {}
    for result, log in zip(results, logs, strict=True):
        least[result.run.data] = min(log, least.get(result.run.data, log))
    factors = [log / least[r.run.data] for r, log in zip(results, logs, strict=True)]
    if metric == "accuracy":
        return [r.outcome.test_accuracy / f for r, f in zip(results, factors, strict=True)]
    return [r.outcome.test_loss * f for r, f in zip(results, factors, strict=True)]


def _cost(result: Result) -> int:
    losses = result.outcome.history["val_loss"]
    return result.outcome.trainable_parameters * (lowest(losses) + 1)


def parameters_to_match(
    results: Iterable[Result], metric: Metric, target: float
) -> dict[dk.models.Kind, int | None]:
    """The parameters of each family's smallest configuration whose mean reaches the target.

    Sizes are those that were trained; nothing is interpolated, since the curves are not monotonic.
    None: no size of the family reaches it. The results must be of one data set.
    """
    groups = by_configuration(results)
    reached: dict[dk.models.Kind, int | None] = {run.kind: None for run in groups}
    for run, trials in groups.items():  # small ones first
        mean = float(np.mean([value(trial, metric) for trial in trials]))
        if reached[run.kind] is None and not better(metric, target, mean) and isfinite(mean):
            reached[run.kind] = trials[0].outcome.trainable_parameters
    return reached


def best_scores(results: Sequence[Result], metric: Metric) -> dict[dk.models.Kind, Summary]:
    """Efficiency of the article's best configuration of each family."""
    chosen = best(plain(results), metric)
    scores: dict[dk.models.Kind, list[float]] = {kind: [] for kind in chosen}
    for result, score in zip(results, efficiency(results, metric), strict=True):
        if chosen.get(result.run.kind) == configuration(result.run):
            scores[result.run.kind].append(score)
    return {kind: summary(values) for kind, values in scores.items()}


@dataclass(frozen=True)
class Comparison:
    """Whether two families differ; q: the p-value after correction for all pairs."""

    a: dk.models.Kind
    b: dk.models.Kind
    difference: float  # of the means, a - b
    p: float
    q: float


def compare_families(results: Sequence[Result], metric: Metric) -> list[Comparison]:
    """Every two families at their best configurations, where both have at least two trials.

    Welch's t-test, since deviations differ up to tenfold between families; p-values are corrected
    by Benjamini and Hochberg. A rank test of five against five trials has no p below 0.008, which
    no correction for ten pairs would leave below 0.05.
    """
    groups = by_configuration(results)
    values = {
        kind: [value(trial, metric) for trial in groups[run]]
        for kind, run in best(results, metric).items()
        if len(groups[run]) > 1
    }
    pairs = list(combinations(values, 2))
    if not pairs:
        return []
    with warnings.catch_warnings():  # of trials that are all alike
        warnings.simplefilter("ignore", RuntimeWarning)
        tests = [stats.ttest_ind(values[a], values[b], equal_var=False) for a, b in pairs]
    ps = [float(test.pvalue) if isfinite(test.pvalue) else 1.0 for test in tests]
    qs = stats.false_discovery_control(ps)
    means = {kind: float(np.mean(of_kind)) for kind, of_kind in values.items()}
    return [
        Comparison(a, b, means[a] - means[b], p, float(q))
        for (a, b), p, q in zip(pairs, ps, qs, strict=True)
    ]


def varied(results: Iterable[Result], field: str) -> dict[dk.models.Kind, dict[Any, list[Result]]]:
    """Of each family the results that differ in this field of the run and in the trial only.

    Of several sizes the one with most values of the field, and of those the one with most results.
    The results must be of one data set.
    """
    default: dict[str, Any] = {f.name: f.default for f in fields(Run) if f.name == field}
    groups: defaultdict[Run, defaultdict[Any, list[Result]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run, trials in by_configuration(results).items():
        base = replace(run, **default)
        if _is_plain(base):
            groups[base][getattr(run, field)] += trials
    chosen: dict[dk.models.Kind, dict[Any, list[Result]]] = {}
    for base, values in groups.items():
        if len(values) > 1 and _extent(values) > _extent(chosen.get(base.kind, {})):
            chosen[base.kind] = dict(sorted(values.items()))
    return chosen


def _extent(values: dict[Any, list[Result]]) -> tuple[int, int]:
    return len(values), sum(map(len, values.values()))
