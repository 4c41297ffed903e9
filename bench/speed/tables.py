"""Prints what bench.speed.run measured; the ratios that say who is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.speed.peers import MODES, OFFICIAL, OURS, PACKAGE

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


def print_configuration(result: Mapping[str, Any]) -> None:
    case, threads = result["case"], result["threads"]
    print(
        f"\n{case['name']} {result['kind']}, {threads} thread{'s' * (threads > 1)}: "
        f"B={case['batch']} N={result['inputs']} S={case['somas']} D={case['dendrites']}, "
        f"{result['synapses']} synapses ({result['density']:.2%}).  ms: median (p20-p80)"
    )
    _print_rows([("", *MODES), *_time_rows(result["ms"], MODES)])
    _print_rows(_ratio_rows(result["ratios"]))
    modes = ("forward", "backward without dx", "backward")
    if result["kernels_ms"]:
        _print_rows([("", *modes), *_time_rows(result["kernels_ms"], modes)])
    _print_roofline(result["roofline"])
    for name, ms in result["step_ms"].items():
        print(f"whole step with Adam, {name}: {_cell(ms)} ms")
    for name, mib in result["memory_mib"].items():
        size = "not known" if mib is None else f"{mib:.1f} MiB"
        print(f"memory growth of a step with Adam, {name}: {size}")
    for what in ("skipped", "refused"):
        for name, reason in result[what].items():
            print(f"{what}: {name}: {reason}")
    print(flush=True)


def _time_rows(times: Times, modes: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [
        (name, *(_cell(by_mode[mode]) if mode in by_mode else "-" for mode in modes))
        for name, by_mode in times.items()
    ]


def _cell(ms: Mapping[str, float]) -> str:
    return f"{ms['p50']:.4g} ({ms['p20']:.3g}-{ms['p80']:.3g})"


def _ratio_rows(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    if not found:
        return []
    official = [
        "-" if found[mode]["official"] is None else f"{found[mode]['official']:.1f}x"
        for mode in found
    ]
    best = [f"{r['best_peer']:.2f}x {r['best_peer_name']}" for r in found.values()]
    ours = next(iter(found.values()))["of"].removeprefix(OURS.split()[0]).strip()
    return [
        (f"masked dense, official / {ours}", *official),
        (f"best peer / {ours}", *best),
    ]


def _print_roofline(found: Mapping[str, Any]) -> None:
    if "unavailable" in found:
        print(f"gather-FMA roofline: {found['unavailable']}")
        return
    reached = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{what} {r[f'{what}_gflops']:.0f} "
            f"({r[f'{what}_fraction']:.0%}, {r[f'{what}_fraction_of_l2']:.0%} of L2's)"
            for what in ("forward", "backward")
        )
        for name, r in found["reached"].items()
    )
    print(
        f"gather-FMA roofline {found['gflops']:.0f} GFLOP/s "
        f"(dendrites one by one {max(found['one_by_one'].values()):.0f}), "
        f"one load per FMA from L2, in order {found['l2']:.0f}"
        f"{'; ' * bool(reached)}{reached}"
    )


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    widths = [34, 30, 30, 30]
    for row in rows:
        cells = [f"{cell:{width}s}" for cell, width in zip(row, widths, strict=False)]
        print("".join(cells).rstrip())
