"""Times the layer on one GPU beside hardware limits and peers, eager and in CUDA graphs.

    python -m bench.gpu.timing --output timing.json [--cases A B C D G] [--seconds 120]

Before a module is timed, y and all gradients of the whole batch are compared with float64; a wrong
one is not timed. Times are medians of CUDA events, with the 20th and 80th percentile. A peer that
fails, or that no graph captures, is reported with its error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe
from bench.gpu.clock import (
    graph_milliseconds,
    milliseconds,
    one_line,
    peak_bytes,
    precision,
    save,
)
from bench.gpu.plans import KERNELS, kernel_times
from bench.gpu.problem import (
    CASES,
    CSR,
    DENSE,
    OTHERS,
    OURS,
    Maker,
    Step,
    adam,
    gradients,
    prepare,
    training_step,
    wanted,
)  # fmt: skip
from dendrite_kernels.benchmark.case import Case
from tests.oracle import relative_error

# Largest relative L2 errors of y and of gradients. Where u or v is next to zero, rounding decides
# the slope: one in 1e7 of them in float32, one in 1e3 in bf16, and gradients err by the root.
TOLERANCE = {
    "fp32": (1e-5, 2e-3), "tf32": (5e-3, 0.1), "bf16": (3e-2, 0.3), "bf16 weights": (3e-2, 0.3),
}  # fmt: skip
COPIED = 1 << 30  # bytes, to measure the bandwidth of memory
TIMES = ("forward, eager", "forward, graph", "step, eager", "step, graph")


def roofs() -> dict[str, float]:
    """Measured bandwidths (bytes read and written) and the shared-memory limit of gathers."""
    properties = torch.cuda.get_device_properties(0)
    large = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    copy = torch.empty_like(large)
    memory = 2 * large.numel() / milliseconds(lambda: copy.copy_(large))["p50"] / 1e9
    small = large[: COPIED >> 7].view(torch.float32)
    target = torch.empty_like(small)
    cached = graph_milliseconds(lambda: target.copy_(small))["p50"]
    cache = 2 * small.nbytes / cached / 1e9
    clock = getattr(properties, "clock_rate", 0) * 1e3 or 1.98e9
    sms = properties.multi_processor_count
    return {"memory_tb_s": memory, "l2_copy_tb_s": cache, "gather_tmac_s": 32 * sms * clock / 1e12}


def errors(
    module: nn.Module, layer: dk.DendriticLayer, x: Tensor, grad: Tensor, want: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors of y, the gradient of x and those of the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    got = {"y": y.detach(), "x": x.grad, **gradients(module, layer.connectivity)}
    found = {name: relative_error(tensor, want[name]) for name, tensor in got.items()}
    module.zero_grad(set_to_none=True)
    return found


def measure(
    name: str, make: Maker, layer: dk.DendriticLayer, x: Tensor, grad: Tensor,
    want: dict[str, Tensor],
) -> dict[str, Any]:  # fmt: skip
    way = name.rsplit(", ", 1)[1]
    with precision(way):
        module = make(layer)
        if way == "bf16 weights":
            module, x = module.bfloat16(), x.bfloat16()

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x)
                return y

        found: dict[str, Any] = {"errors": errors(module, layer, x, grad, want)}
        found["errors"]["y without gradients"] = relative_error(forward(), want["y"])
        of_y, of_gradients = TOLERANCE[way]
        limits = {name: of_y if name[:1] == "y" else of_gradients for name in found["errors"]}
        wrong = {name: e for name, e in found["errors"].items() if not e <= limits[name]}
        if wrong:
            return {**found, "error": f"not timed, since these relative errors are large: {wrong}"}
        step = training_step(module, adam(module), x, grad.to(forward().dtype))
        found["forward, eager"], found["step, eager"] = milliseconds(forward), milliseconds(step)
        module.zero_grad(set_to_none=True)  # gradients are memory of the step
        found["step memory mb"] = peak_bytes(step) / 1e6
        found["forward, graph"], found["step, graph"] = in_a_graph(forward), in_a_graph(step)
    return found


def in_a_graph(run: Step) -> dict[str, Any]:
    try:
        return graph_milliseconds(run)
    except Exception as fault:
        return {"error": one_line(fault)}


def measure_case(
    case: Case, makers: Mapping[str, Maker], kernels: bool, deadline: float
) -> dict[str, Any]:
    """The modules of one case by name; `kernels`: ours one by one, too."""
    layer, x, grad = prepare(case)
    found: dict[str, Any] = {}
    want = wanted(layer, x, grad)
    for name, make in makers.items():
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("no time left")
            found[name] = measure(name, make, layer, x, grad, want)
        except Exception as fault:  # out of memory or unsupported: reported
            found[name] = {"error": one_line(fault)}
        torch.cuda.empty_cache()
    if kernels and all("error" not in entry for entry in found.values()):
        found["our kernels, graph"] = kernel_times(layer, x, grad)
    return found


def ratio(entry: Mapping[str, Any], ours: Mapping[str, Any], what: str) -> float | None:
    pair = [side.get(what, {}).get("p50") for side in (entry, ours)]
    return None if None in pair or not pair[1] else pair[0] / pair[1]


def compare(found: dict[str, Any]) -> None:
    """Adds how often our time a peer takes: eager by eager, graph by graph, bf16 by bf16."""
    for name, entry in found.items():
        ours = found.get("ours, bf16" if "bf16" in name else "ours, fp32", {})
        if name not in OURS and "errors" in entry:
            entry["times ours"] = {what: ratio(entry, ours, what) for what in TIMES}


def cell(entry: Mapping[str, Any], what: str) -> str:
    value = entry[what].get("p50")
    times = entry.get("times ours", {}).get(what)
    shown = "no graph" if value is None else f"{value:.4f} ms"
    return shown + ("" if times is None else f" {times:6.2f}x")


def report(title: str, case: Case, found: Mapping[str, Any], gather: float) -> None:
    print(f"\n{title}: {case}; density {case.synapses / case.in_features:.2%}")
    for name, ms in found.get("our kernels, graph", {}).items():
        share = case.batch * case.rows * case.synapses / gather / 1e9 / ms["p50"]
        limit = f", {share:.0%} of the shared-memory limit" if name in KERNELS else ""
        print(f"   {name:32s}{ms['p50']:10.4f} ms{limit}")
    print(" " * 35 + "".join(f"{what:>24s}" for what in TIMES))
    for name, entry in found.items():
        if "error" in entry:
            print(f"   {name:32s}{entry['error'][:120]}")
        elif "errors" in entry:
            print(f"   {name:32s}" + "".join(f"{cell(entry, what):>24s}" for what in TIMES))


def report_ratios(cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Where dense or another way wins: ratios below 1."""
    print("\ntimes our time in graphs, forward / step" + "".join(f"{name:>16s}" for name in cases))
    for peer in (*DENSE, *OTHERS, *CSR):
        cells = []
        for found in cases.values():
            times = found.get(peer, {}).get("times ours", {})
            pair = [times.get(what) for what in ("forward, graph", "step, graph")]
            cells.append(" / ".join("-" if value is None else f"{value:.2f}" for value in pair))
        print(f"{peer:40s}" + "".join(f"{cell:>16s}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
        "environment": describe(),
        "roofs": roofs(),
        "cases": {name: {} for name in options.cases},
    }
    failed = False
    # The most important ones first, since time may run out.
    for makers in (OURS, DENSE, OTHERS, CSR):
        for name in options.cases:
            if makers is not OURS and name == "G":
                continue  # nothing else holds it
            found = results["cases"][name]
            try:
                found |= measure_case(CASES[name], makers, makers is OURS, deadline)
            except Exception as fault:  # the other cases still count
                found["all"] = {"error": one_line(fault)}
            failed |= any("error" in found.get(ours, {}) for ours in ("all", *OURS))
            compare(found)
            save(options.output, results)
            torch.cuda.empty_cache()
    for name in options.cases:
        report(name, CASES[name], results["cases"][name], results["roofs"]["gather_tmac_s"])
    report_ratios(results["cases"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
