"""Training with little GPU memory: the largest layer in a budget, and a layer of 33.5 M synapses.

    python -m bench.gpu.memory --output memory.json [--budget-gb 1]

The budget is for everything that a training step allocates besides its input: parameters, optimizer
state, gradients, activations, workspaces. Our layer runs the optimizer during backward
(StepInBackward), so not all gradients exist at the same time.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dendrite_kernels as dk
from bench.environment import describe
from bench.gpu.clock import milliseconds, peak_bytes, save
from bench.gpu.problem import CASES, adam, training_step
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.optim import StepInBackward

DENDRITES, SYNAPSES, BATCH = 16, 32, 128
FIRST, LIMIT = 256, 1 << 17  # inputs: narrower and wider is not tried
BUDGET_GB = 1.0


def ours(case: Case, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    layer = dk.DendriticLayer(case.connectivity("constant"), device="cuda")
    StepInBackward(layer.parameters(), lambda p: torch.optim.Adam(p, lr=1e-4, fused=True))
    return lambda: layer(x).backward(grad)


def masked_dense(case: Case, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    """Two matrices and their masks, made directly, so that no sparse layer takes memory, too."""
    rows = case.rows
    mask = torch.zeros(rows, case.in_features, device="cuda")
    mask[:, : case.synapses] = 1  # time and memory do not depend on which entries
    soma_mask = torch.zeros(case.somas, rows, device="cuda")
    soma_mask.view(case.somas, case.somas, case.dendrites).diagonal().fill_(1)
    with torch.device("cuda"):
        linears = nn.Linear(case.in_features, rows), nn.Linear(rows, case.somas)
    module = MaskedDendriticLayer(linears[0], mask, linears[1], soma_mask)
    return training_step(module, adam(module), x, grad)


Make = Callable[[Case, torch.Tensor, torch.Tensor], Callable[[], object]]


def bytes_of_training(make: Make, case: Case) -> int:
    """Peak allocation of three steps beyond x and grad."""
    gc.collect()
    torch.cuda.empty_cache()
    x = torch.randn(case.batch, case.in_features, device="cuda")
    grad = torch.randn(case.batch, case.somas, device="cuda")

    def train() -> None:
        step = make(case, x, grad)
        for _ in range(3):
            step()

    return peak_bytes(train)


def largest(make: Make, budget: int) -> dict[str, int]:
    """The widest square layer (N = S) whose training fits, within one sixteenth."""
    found: dict[int, int] = {0: 0}

    def fits(width: int) -> bool:
        case = Case(f"{width}", BATCH, 1, width, 1, width, DENDRITES, SYNAPSES)
        try:
            needed = bytes_of_training(make, case)
        except torch.cuda.OutOfMemoryError:
            return False
        if needed <= budget:
            found[width] = needed
        return needed <= budget

    high = FIRST
    while high < LIMIT and fits(high):
        high *= 2
    low = max(found)
    while high - low > max(FIRST // 4, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"width": low, "synapses": low * DENDRITES * SYNAPSES, "bytes": found[low]}


def wide_layer() -> dict[str, Any]:
    """Case G with B = 512: its weights as a dense matrix would take 275 GB."""
    case = CASES["G"]
    used = bytes_of_training(ours, case)
    x = torch.randn(case.batch, case.in_features, device="cuda")
    grad = torch.randn(case.batch, case.somas, device="cuda")
    step = ours(case, x, grad)
    return {"sizes": vars(case), "bytes": used, "step_ms": milliseconds(step)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-gb", type=float, default=BUDGET_GB)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    wide = wide_layer()
    print(
        f"G: {wide['bytes'] / 1e9:.2f} GB beyond the input (limit 2),"
        f" {wide['step_ms']['p50']:.1f} ms a step (limit 30)"
    )
    budget = int(options.budget_gb * 1e9)
    found = {"ours": largest(ours, budget), "masked dense": largest(masked_dense, budget)}
    for name, entry in found.items():
        print(f"{name}: N = S = {entry['width']}, {entry['synapses']:,} synapses")
    results = {
        "device": torch.cuda.get_device_name(0),
        "environment": describe(),
        "backend": dk.backend_info()["cuda"],
        "budget_bytes": budget,
        "largest": found,
        "wide layer": wide,
    }
    save(options.output, results)
    return int(wide["bytes"] > 2e9)


if __name__ == "__main__":
    sys.exit(main())
