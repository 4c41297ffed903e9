"""What `bench` prints: who is fastest, where dense would win, what training takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .peer import MODES
from .peers import DENSE, PACKAGE
from .tables import Times, print_rows, time_rows


def winners(times: Times) -> dict[str, dict[str, Any]]:
    """For each mode the fastest candidate, and how many times as long the others take: the fastest
    of this package's, of dense ways and of other ways; None where none ran.
    """
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        medians = {name: modes[mode]["p50"] for name, modes in times.items() if mode in modes}
        if not medians:
            continue
        best = min(medians, key=lambda name: medians[name])
        groups = {
            "ours": [ms for name, ms in medians.items() if name in PACKAGE],
            "dense": [ms for name, ms in medians.items() if name in DENSE],
            "other": [ms for name, ms in medians.items() if name not in (*PACKAGE, *DENSE)],
        }
        slower = {name: min(ms) / medians[best] if ms else None for name, ms in groups.items()}
        found[mode] = {"name": best, **slower}
    return found


def dense_from(times: Times, density: float) -> dict[str, float]:
    """For each mode the density from which a dense way would win; more than 1: never.

    Extrapolated: a dense product takes as long at any density, ours grows with it.
    """
    found = {}
    for mode, entry in winners(times).items():
        if entry["dense"] is not None and entry["ours"] is not None:
            found[mode] = density * entry["dense"] / entry["ours"]
    return found


def print_report(found: Mapping[str, Any]) -> None:
    case, environment = found["case"], found["environment"]
    error = max(found["relative_errors"].values(), default=0.0)
    print(
        f"B={case['batch']} N={found['inputs']} S={case['somas']} D={case['dendrites']}"
        f" K={case['synapses']}, {found['rule']}: {found['synapses']:,} synapses, a density of"
        f" {found['density']:.3g}"
    )
    print(
        f"{found['dtype']} on {found['device']}, {environment['threads']} threads,"
        f" {environment['cpu']}, torch {environment['versions']['torch']}, {environment['date']}"
    )
    print(f"Relative errors against float64: at most {error:.0e}. ms: median (p20-p80)\n")
    print_rows([("", *MODES), *time_rows(found["ms"], MODES)])
    print()
    print_rows([("fastest", *_each(found["winners"], _name)), *_ratio_rows(found["winners"])])
    dense = found["dense_wins_from_density"]
    print_rows([("dense would win from a density of", *_each(dense, _density))])
    for name, entry in found["training"].items():
        print(f"training with Adam, {name}: {_training(entry)}")
    for what in ("skipped", "refused"):
        for name, reason in found[what].items():
            print(f"{what}: {name}: {reason}")


def _each(values: Mapping[str, Any], show: Any) -> list[str]:
    return [show(values[mode]) if mode in values else "-" for mode in MODES]


def _name(winner: Mapping[str, Any]) -> str:
    return str(winner["name"])


def _density(density: float) -> str:
    return "never" if density > 1 else f"{density:.0%}"


def _ratio_rows(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """How many times as long each group's fastest takes."""

    def ratio(group: str) -> list[str]:
        return _each(found, lambda entry: f"{entry[group]:.3g}x" if entry[group] else "-")

    titles = {"ours": "dendrite_kernels / fastest", "dense": "masked dense / fastest",
              "other": "other ways / fastest"}  # fmt: skip
    return [(title, *ratio(group)) for group, title in titles.items()]


def _training(entry: Mapping[str, Any]) -> str:
    estimated = f"{entry['estimated_mib']:,.4g} MiB estimated"
    if "growth_mib" not in entry:
        return f"{estimated}, more than this machine has to spare"
    measured = [
        f"{entry[key]:,.4g} MiB {what}"
        for key, what in (("growth_mib", "more than before"), ("peak_mib", "the whole process"))
        if entry[key] is not None
    ]
    return ", ".join(
        [*measured, estimated, f"{1e3 * entry['step_seconds']:.3g} ms the fastest step"]
    )
