"""Rows of medians, and the ratios that say who is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .peer import MODES
from .peers import OFFICIAL, PACKAGE

Times = Mapping[str, Mapping[str, Mapping[str, float]]]  # candidate -> mode -> percentiles in ms


def ratios(times: Times) -> dict[str, dict[str, Any]]:
    """For each mode, medians of masked dense and of the fastest peer over the package's."""
    ours = next((name for name in PACKAGE if name in times), None)
    if ours is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        medians = {name: modes[mode]["p50"] for name, modes in times.items() if mode in modes}
        own = medians[ours]
        peers = {name: ms for name, ms in medians.items() if name not in PACKAGE}
        if not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        official = medians[OFFICIAL] / own if OFFICIAL in medians else None
        found[mode] = {
            "of": ours,
            "official": official,
            "best_peer": peers[best] / own,
            "best_peer_name": best,
        }
    return found


def time_rows(times: Times, modes: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [
        (name, *(cell(by_mode[mode]) if mode in by_mode else "-" for mode in modes))
        for name, by_mode in times.items()
    ]


def cell(ms: Mapping[str, float]) -> str:
    return f"{ms['p50']:.4g} ({ms['p20']:.3g}-{ms['p80']:.3g})"


def print_rows(rows: list[tuple[str, ...]]) -> None:
    widths = [34, 30, 30, 30]
    for row in rows:
        cells = [f"{cell:{width}s}" for cell, width in zip(row, widths, strict=False)]
        print("".join(cells).rstrip())
