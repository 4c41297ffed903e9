"""Rows of medians."""

from __future__ import annotations

from collections.abc import Mapping

Times = Mapping[str, Mapping[str, Mapping[str, float]]]  # candidate -> mode -> percentiles in ms


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
