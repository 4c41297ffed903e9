"""The sections of the report: HTML of what a file of results says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from bench import page, plots
from bench.speed import report_plots
from bench.speed.report_plots import Rows
from dendrite_kernels.benchmark.peer import MODES
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS

Found = Mapping[str, Any]
_LETTERS = "B is the batch, N inputs, S somas, D dendrites of a soma, K synapses of a dendrite."


def speed(found: Found) -> str:
    """Ours against other ways, what we lose first."""
    compared = [one for one in found["configurations"] if one["ratios"]]
    if not compared:
        return page.bullets(["None of our backends ran beside another way."]) + _not_timed(found)
    best = [r["best_peer"] for one in compared for r in one["ratios"].values()]
    official = [r["official"] for one in compared for r in one["ratios"].values() if r["official"]]
    text = f"The fastest other way takes {_range(best)} times as long as ours"
    if official:
        text += f", masked dense as the article does it {_range(official)}"
    panels: dict[str, Rows] = {
        f"{mode}, {_plural(threads)}": {
            _name(one): one["ratios"][mode]["all"]
            for one in compared
            if one["threads"] == threads and mode in one["ratios"]
        }
        for threads in _numbers_of_threads(compared)
        for mode in MODES
    }
    caption = (
        "How many times as long as ours each way takes: the median of the ratios of neighbouring "
        "turns. Left of 1, in red, we lose. Training is forward and backward."
    )
    return (
        f"<p><strong>{escape(text)}.</strong></p>\n"
        f"<h3>Where we lose</h3>\n{page.bullets(_lost(compared) or ['Nowhere here.'])}"
        f"{_figure('speed', _dots(panels, 'times as long as ours', lose=True), caption, found)}"
        f"{page.details('Sizes of the cases', page.bullets([*_sizes(compared), _LETTERS]))}"
        f"{page.details('All times', _times(compared))}{_not_timed(found)}"
    )


def _lost(configurations: Sequence[Found]) -> list[str]:
    return [
        f"{_name(one)}, {_plural(one['threads'])}, {mode}: {r['best_peer_name']} takes "
        f"{r['best_peer']:.2f} times as long as {r['of']}."
        for one in configurations
        for mode, r in one["ratios"].items()
        if r["best_peer"] < 1
    ]


def _sizes(configurations: Sequence[Found]) -> list[str]:
    lines = (
        f"{_name(one)}: B={one['case']['batch']}, N={one['inputs']}, S={one['case']['somas']}, "
        f"D={one['case']['dendrites']}, K={one['case']['synapses']}."
        for one in configurations
    )
    return list(dict.fromkeys(lines))


def _times(configurations: Sequence[Found]) -> str:
    head = "case", "threads", "", "ours, ms (20th to 80th percentile)", OFFICIAL, "best other", ""
    rows = [
        (
            _name(one),
            str(one["threads"]),
            mode,
            "{1:.4g} ({0:.3g} to {2:.3g})".format(*one["ms"][r["of"]][mode]),
            f"{r['official']:.1f}x" if r["official"] else "-",
            f"{r['best_peer']:.2f}x{' (we lose)' if r['best_peer'] < 1 else ''}",
            r["best_peer_name"],
        )
        for one in configurations
        for mode, r in one["ratios"].items()
    ]
    return page.table(head, rows)


def memory(found: Found) -> str:
    rows = {
        f"{_name(one)}, {_plural(one['threads'])}": {
            name: mib for name, mib in one["memory_mib"].items() if mib
        }
        for one in found["configurations"]
        if any(one["memory_mib"].values())
    }
    if not rows:
        return page.bullets(
            ["Not measured: bench.speed.run ran without --memory, or the system does not tell."]
        )
    head = "case", "ours, MiB", "masked dense, MiB", "ratio"
    table = [
        (name, f"{mib[OURS]:.1f}", f"{mib[OFFICIAL]:.1f}", f"{mib[OFFICIAL] / mib[OURS]:.1f}")
        for name, mib in rows.items()
        if OURS in mib and OFFICIAL in mib
    ]
    caption = (
        "What making a layer and training it with Adam adds to a fresh process, ours and masked "
        "dense as the article does it. Samples are left out. A row without masked dense: it would "
        "need more than 4 GiB."
    )
    panels = {"growth of the process": rows}
    drawn = _figure("memory", _dots(panels, "MiB"), caption, found)
    return drawn + page.details("All sizes", page.table(head, table))


def roofline(found: Found) -> str:
    known = [one for one in found["configurations"] if "unavailable" not in one["roofline"]]
    if not known:
        reasons = {one["roofline"]["unavailable"] for one in found["configurations"]}
        return page.bullets(f"No roof was measured: {reason}" for reason in reasons)
    panels: dict[str, Rows] = {}
    shares = []
    for threads in _numbers_of_threads(known):
        rows: dict[str, Mapping[str, float]] = {}
        for one in known:
            if one["threads"] != threads:
                continue
            roof, reached = one["roofline"], one["roofline"]["reached"]
            rates = {
                f"{kernels}, {what}": r[f"{what}_gflops"]
                for kernels, r in reached.items()
                for what in ("forward", "backward")
            }
            rows[_name(one)] = {
                "the roof": roof["gflops"],
                "roof of L2 in order": roof["l2"],
                **rates,
            }
            shares += [
                (
                    _name(one),
                    str(threads),
                    kernels,
                    *(f"{r[f'{what}_fraction']:.0%}" for what in ("forward", "backward")),
                )
                for kernels, r in reached.items()
            ]
        panels[_plural(threads)] = rows
    caption = (
        "Work per second of the kernels, and the roof: multiply-adds that each read a random row "
        "of a tile of inputs, with nothing else to do. The second roof reads the second-level "
        "cache in order. Medians. Shares are medians of the shares of neighbouring turns, and can "
        "differ from what medians of GFLOP/s say."
    )
    drawn = _figure("roofline", _dots(panels, "GFLOP/s", log=False), caption, found)
    head = "case", "threads", "", "forward, share of the roof", "backward"
    return drawn + page.table(head, shares)


def crossover(found: Found) -> str:
    figures, rows = [], []
    for sweep in found["sweeps"]:
        for mode in MODES:
            crossings = {
                dense: by_mode[mode]
                for dense, by_mode in sweep["crossovers"].items()
                if mode in by_mode
            }
            points = [
                p
                for p in sweep["points"]
                if not p["refused"] and crossings.keys() <= p["ratios"].keys()
            ]
            densities = [p["density"] for p in points]
            ratios = {dense: [p["ratios"][dense][mode] for p in points] for dense in crossings}
            title = f"{mode}, N={sweep['inputs']}"
            figures.append(report_plots.curves(title, densities, ratios, crossings))
            size = f"N={sweep['inputs']}, S={sweep['somas']}, D={sweep['dendrites']}"
            rows += [
                (f"{size}, B={sweep['batch']}", mode, dense, _density(where, densities[-1]))
                for dense, where in crossings.items()
            ]
    series = list(dict.fromkeys(row[2] for row in rows))
    caption = (
        "How many times as long as ours dense ways take, by the density of synapses: the median "
        "of the ratios of neighbouring turns. In red dense wins; a dotted line marks where that "
        "begins."
    )
    drawn = _figure("crossover", [report_plots.legend(series), *figures], caption, found)
    return drawn + page.table(("layer", "", "dense way", "wins from a density of"), rows)


def overhead(found: Found) -> str:
    layers, aim = found["layers_us"], found["aim_us"]
    late = [
        f"dendritic_layer, {way}: {us:.1f} us, where {aim[way]:.1f} us are wanted."
        for way, us in layers["dendritic_layer"].items()
        if us > aim[way]
    ]
    named = {**layers, "aim: 3 us + 1.6 F.linear": aim}
    panels: dict[str, Rows] = {
        title: {
            way.removeprefix("compiled "): {name: us[way] for name, us in named.items()}
            for way in aim
            if way.startswith("compiled") == (title == "compiled")
        }
        for title in ("eager", "compiled")
    }
    caption = (
        "Microseconds of processor time of a call, the least of many: a tiny layer of the "
        f"{found['backend']} backend, batch {found['batch']}, one thread."
    )
    drawn = _figure("overhead", _dots(panels, "us"), caption, found)
    parts = [(name, f"{us:.2f}") for name, us in found["parts_us"].items()]
    inside = page.details("Parts of a call", page.table(("part of dendritic_layer", "us"), parts))
    missed = f"<h3>Where the aim is missed</h3>\n{page.bullets(late or ['Nowhere.'])}"
    return missed + drawn + inside * bool(parts)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _name(one: Found) -> str:
    kind = "" if one["kind"] == "constant" else f" {one['kind']}"
    return f"{one['case']['name']}{kind}"


def _plural(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _numbers_of_threads(configurations: Sequence[Found]) -> list[int]:
    return sorted({one["threads"] for one in configurations})


def _density(where: float | None, last: float) -> str:
    return f"above {last:.0%}" if where is None else f"{where:.1%}"


def _not_timed(found: Found) -> str:
    """Who was refused stands in the open, who could not run in a box."""
    lines = {
        what: [
            f"{_name(one)}, {_plural(one['threads'])}: {name}: {reason}"
            for one in found["configurations"]
            for name, reason in one[what].items()
        ]
        for what in ("refused", "skipped")
    }
    refused = f"<h3>Refused: wrong results</h3>\n{page.bullets(lines['refused'])}"
    skipped = page.details("Not timed", page.bullets(lines["skipped"]))
    return refused * bool(lines["refused"]) + skipped * bool(lines["skipped"])


def _dots(
    panels: Mapping[str, Rows], label: str, lose: bool = False, log: bool = True
) -> list[Figure]:
    """A legend for all panels, and the panels."""
    series = report_plots.series_of(panels.values())
    drawn = (
        report_plots.dots(title, label, rows, series, lose, log)
        for title, rows in panels.items()
        if rows
    )
    return [report_plots.legend(series), *drawn]


def _figure(name: str, panels: Sequence[Figure], caption: str, found: Found) -> str:
    """The first panel is the legend: it has a line of its own."""
    key, *pictures = (
        page.picture(plots.svg(panel, f"{name}-{i}"), f"{name}, panel {i}")
        for i, panel in enumerate(panels)
    )
    written = f"Written by {page.code(found['command'])}, {escape(found['environment']['date'])}."
    return (
        f"<figure id='{name}'>\n{key}<div class='panels'>\n{''.join(pictures)}</div>\n"
        f"<figcaption><p>{escape(caption)}</p>\n<p class='note'>{written}</p></figcaption>\n"
        "</figure>\n"
    )
