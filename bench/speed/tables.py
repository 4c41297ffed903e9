"""Prints what bench.speed.run measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from bench.speed.kernels import KERNELS
from dendrite_kernels.benchmark.peer import MODES
from dendrite_kernels.benchmark.peers import OURS
from dendrite_kernels.benchmark.tables import cell, time_rows


def print_configuration(result: Mapping[str, Any]) -> None:
    case, threads = result["case"], result["threads"]
    print(
        f"\n{case['name']} {result['kind']}, {threads} thread{'s' * (threads > 1)}: "
        f"B={case['batch']} N={result['inputs']} S={case['somas']} D={case['dendrites']}, "
        f"{result['synapses']} synapses ({result['density']:.2%}).  ms: median (p20-p80)"
    )
    rows = [*time_rows(result["ms"], MODES), *_ratio_rows(result["ratios"])]
    print(tabulate(rows, ("", *MODES), "plain"))
    if result["kernels_ms"]:
        print(tabulate(time_rows(result["kernels_ms"], KERNELS), ("", *KERNELS), "plain"))
    _print_roofline(result["roofline"])
    for name, ms in result["step_ms"].items():
        print(f"whole step with Adam, {name}: {cell(ms)} ms")
    for name, mib in result["memory_mib"].items():
        size = "not known" if mib is None else f"{mib:.1f} MiB"
        print(f"memory growth of a step with Adam, {name}: {size}")
    for what in ("skipped", "refused"):
        for name, reason in result[what].items():
            print(f"{what}: {name}: {reason}")
    print(flush=True)


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
