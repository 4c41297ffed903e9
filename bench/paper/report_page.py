"""The report: one HTML page that needs nothing else, ours beside the article's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bench import page, plots
from bench.environment import describe
from bench.paper import figures
from bench.paper.article import DATA, PUBLISHED, TRIALS, Cell, compare
from bench.paper.figures import style
from bench.paper.report_tables import (
    article_table,
    best_table,
    comparison_table,
    configuration_table,
    cost_table,
)
from bench.paper.result import Result
from bench.paper.statistics import data_name, families, plain, sequential, varied

FILE = "report.html"
VARIED = "noise", "layers", "dropout", "lr"
_TITLE = "Dendritic networks: ours beside the article's"
_COMMANDS = (
    ("make paper", "the quick sweep, its figures and this page"),
    ("make paper-full", "all of the article's grid"),
)


def report(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the figures and FILE into the folder; embeddings are those that are there."""
    drawn = list(figures.draw_all(results, folder))
    paths = [
        path for one in drawn for path in plots.save(one.figure, folder / figures.FOLDER, one.name)
    ]
    pictures = [path for path in paths if path.suffix == ".svg"]
    sections = [
        ("Beside the article", _article(compare(results))),
        *((f"Data set {name}", _of_data(name, results)) for name in _names(results)),
        ("Figures", "".join(map(_figure, drawn, pictures))),
        ("Cost", f"<h3>Seconds of a training</h3>\n{cost_table(results)}"),
        ("What is missing", page.bullets(_missing(results))),
        ("How to make this page", _reproduce()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    file.write_text(page.page(_TITLE, _introduction(results), sections), encoding="utf-8")
    return [*paths, file]


def _names(results: Iterable[Result]) -> list[str]:
    return sorted({result.run.data for result in results})


def _introduction(results: Sequence[Result]) -> str:
    seeds = sorted({result.run.trial for result in results})
    text = (
        f"{len(results):,} trainings of {len(families(results))} families on "
        f"{_listed(_names(results))}, seeds {_listed(map(str, seeds))}. The article is "
        "Chavlis & Poirazi, Dendrites endow artificial neural networks with accurate, robust and "
        "parameter-efficient learning, Nature Communications 16:943 (2025)."
    )
    machine = describe()
    where = (
        f"This page was written {machine['date']} on {machine['cpu']}, {machine['system']}, "
        f"{page.versions(machine)}, commit {machine['commit']}. Where and when the trainings ran, "
        "and with which versions, is not recorded in their tables: it may have been elsewhere."
    )
    return f"<p>{escape(text)}</p>\n<p class='note'>{escape(where)}</p>"


def _article(cells: Sequence[Cell]) -> str:
    known = [cell for cell in cells if cell.ours is not None]
    if not known:
        return (
            "<p>None of the article's numbers has a counterpart here: it has none for "
            "these data sets, and the tables below are ours alone.</p>\n"
        )
    note = (
        "Ours is the best mean on the test set over the sizes that were trained, as in the "
        "article; mean ± standard deviation over n trials, with the 95 % confidence interval of "
        "the mean. “In deviations”: the difference in standard deviations of a trial, the root "
        "mean square of ours and the article's. It is left out where one of them is not known: "
        "the article does not give all, and one trial has none."
    )
    tables: dict[str, list[Cell]] = {}
    for cell in known:
        tables.setdefault(cell.article.table, []).append(cell)
    return f"<p>{escape(note)}</p>\n" + "".join(
        f"<h3>{escape(title)}</h3>\n{article_table(rows)}" for title, rows in tables.items()
    )


def _of_data(name: str, results: Sequence[Result]) -> str:
    own = [result for result in results if result.run.data == name]
    if not plain(own):
        return "<p>No network of the article's protocol was trained on it.</p>\n"
    return (
        f"<h3>The best network of each family</h3>\n{best_table(own)}"
        f"{page.details('Whether families differ', comparison_table(own))}"
        f"{page.details('All configurations', configuration_table(own))}"
    )


def _figure(drawn: figures.Drawn, picture: Path) -> str:
    title = f"{drawn.data}: {drawn.title}"
    return (
        f"<figure id='{escape(drawn.name)}'>\n<h3>{escape(title)}</h3>\n"
        f"{page.picture(picture.read_bytes(), title)}"
        f"<figcaption><p><strong>{escape(drawn.seen)}</strong></p>"
        f"<p>{escape(drawn.caption)}</p></figcaption>\n</figure>\n"
    )


def _missing(results: Sequence[Result]) -> list[str]:
    """What the article has and these results have not."""
    names = {data_name(name) for name in _names(results)}
    items = [f"Data sets that were not trained: {_listed(d for d in DATA if d not in names)}."]
    for name in _names(results):
        of_data = [result for result in results if result.run.data == name]
        own = plain(of_data)
        if style.absent(families(own)):
            items.append(f"{name}, {style.absent(families(own))}.")
        trials = {result.run.trial for result in own}
        if len(trials) < TRIALS:
            items.append(f"{name}: {len(trials)} trials instead of {TRIALS}.")
        tasks = [field for field in VARIED if not varied(of_data, field)]
        tasks += [] if sequential(of_data) else ["the order of the classes"]
        if tasks:
            items.append(f"{name}: not varied: {', '.join(tasks)}.")
    gone = sum(cell.ours is None for cell in compare(results))
    items.append(f"Numbers of the article without a counterpart: {gone} of {len(PUBLISHED)}.")
    items.append(
        "The article's results with noise, efficiency scores and best sizes are not compared."
    )
    return items


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _reproduce() -> str:
    rows = "".join(
        f"<li><code>{escape(command)}</code>: {escape(what)}</li>\n" for command, what in _COMMANDS
    )
    seeds = (
        "A trial is the seed of masks, weights, split, noise and batches: the same trial gives the "
        "same network on the same machine."
    )
    return f"<p>In a checkout of the commit above:</p>\n<ul>\n{rows}</ul>\n<p>{seeds}</p>\n"
