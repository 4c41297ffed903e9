"""Times of the CUDA kernels as the planner's model predicts them: arithmetic, not a measurement.

    python -m bench.gpu.model

A block issues `instructions` (four a cycle), takes `wavefronts` of shared memory (one a cycle) and
reads bytes from L2; the slowest of these, or the latency, is its time, and staging comes before.
docs/cuda.md explains it. No GPU takes part: limits and clock are those of an H100.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

import dendrite_kernels as dk
from bench.gpu.problem import CASES
from dendrite_kernels.backends.cuda import plan as planner
from dendrite_kernels.backends.cuda.plan import Limits, TilePlan, Work
from dendrite_kernels.benchmark.case import Case

H100 = Limits(132, 227 << 10, 228 << 10, 50 << 20)
CLOCK = 1755  # cycles in a microsecond
MEMORY = 3e6  # bytes in a microsecond
# Instructions of a step and a row when groups of lanes took the synapses of one row, by groups:
# counted by hand in a review of the kernels of 23 November 2026.
BEFORE = {
    "forward": {2: (46, 100), 4: (46, 100), 8: (46, 104)},
    "backward_weight": {2: (59, 69), 4: (59, 69), 8: (56, 71)},
    "backward_input": {2: (88, 81), 4: (88, 81), 8: (88, 85)},
}
DENSE = 820  # multiply-adds of a tensor core product in a cycle, bound by ldmatrix: 2.5 cycles each


def work_of(case: Case, kernel: str, itemsize: int = 4) -> Work:
    rows = case.somas * case.dendrites
    synapses = rows * case.synapses
    if kernel == "backward_input":
        inputs = case.in_features
        return Work(case.batch, case.somas, inputs, inputs, synapses, 4, rows)
    return Work(case.batch, case.in_features, case.somas, rows, synapses, itemsize)


def plan_of(work: Work, kernel: str) -> TilePlan:
    decide = planner.plan_weight if kernel == "backward_weight" else planner.plan_tiles
    return decide(work, H100)


def turns(plan: TilePlan) -> int:
    """Blocks that a multiprocessor runs one after the other, tile by tile."""
    blocks = -(-plan.blocks // H100.multiprocessors)
    return blocks * -(-plan.tiles // plan.tile_groups) if plan.tile_groups else blocks


def predicted(work: Work, plan: TilePlan, kernel: str) -> float:
    """In microseconds, without the launch."""
    cycles = planner.block_cycles(plan, work, H100, planner.COSTS[kernel])
    return turns(plan) * cycles / CLOCK


def before(work: Work, kernel: str) -> float:
    """By instructions alone, with the tiles of several groups that took the fewest."""
    found = []
    for kind in planner.KINDS[4]:
        if kind.groups > 1 and planner.tile_bytes(kind, work) <= H100.block_shared:
            step, row = BEFORE[kernel][kind.groups]
            steps = -(-work.synapses // (work.rows * kind.step))
            tiles = -(-work.batch // kind.samples)
            found.append(work.rows * tiles * (steps * step + row))
    return min(found, default=math.nan) / planner.ISSUE / H100.multiprocessors / CLOCK


def on_tensor_cores(case: Case, density: float, plan: TilePlan) -> float:
    """Forward with each soma's neighbourhood as a dense matrix in bf16.

    The tile of samples is that of `plan`; every tile reads the dense matrices, 2 bytes an element.
    """
    elements = case.somas * case.dendrites * case.synapses / density
    products = elements * case.batch / (DENSE * H100.multiprocessors)
    bytes_ = 2 * elements * plan.tiles / (planner.L2_BYTES * H100.multiprocessors)
    return (max(products, bytes_) + turns(plan) * plan.shared_bytes / planner.L2_BYTES) / CLOCK


def density(case: Case) -> float:
    """Synapses per element of the matrices [dendrites of a soma, inputs that any of them reads]."""
    c = dk.connectivity.global_receptive_fields(
        (case.height, case.width), case.somas, case.dendrites, case.synapses // case.channels,
        channels=case.channels, seed=0,
    )  # fmt: skip
    ends = c.crow_indices.numpy()[c.soma_ptr.numpy()]
    inputs = [np.unique(part).size for part in np.split(c.columns, ends[1:-1])]
    return c.nnz / (case.dendrites * float(np.sum(inputs)))


def split_somas(case: Case) -> float:
    """Forward with 64 samples a tile, if warps shared a soma's dendrites and none waited."""
    kind = planner.KINDS[4][0]
    work = work_of(case, "forward")
    tiles = -(-case.batch // kind.samples)
    parts = H100.multiprocessors // tiles
    plan = TilePlan(kind, tiles, parts, 0, 1024, planner.tile_bytes(kind, work))
    issue, banks, bytes_ = planner.demands(plan, work, planner.COSTS["forward"])
    busy = max(issue / planner.ISSUE, banks, bytes_ / planner.L2_BYTES)
    return (busy + planner.stage_cycles(plan, work)) / CLOCK


# Bytes of a synapse that packing its weight twice, finishing its gradient and Adam move.
PACKED, FINISHED, STEPPED = 12, 16, 32
UNSTORED = 8  # those of the gradient, which Adam in the last kernel neither writes nor reads


def kernels_of(name: str, case: Case) -> dict[str, Work]:
    """What a step of a case runs; G is a first layer, whose x needs no gradient."""
    return {k: work_of(case, k) for k in planner.COSTS if (name, k) != ("G", "backward_input")}


def whole_step(name: str, case: Case) -> float:
    """Forward, backward and Adam in microseconds."""
    works = kernels_of(name, case)
    times = sum(predicted(work, plan_of(work, kernel), kernel) for kernel, work in works.items())
    packings = len(works) - 1  # the weights' kernel needs none
    moved = PACKED * packings + FINISHED + STEPPED
    return times + moved * case.rows * case.synapses / MEMORY


def main() -> None:
    print("kernel                 kind   instructions  wavefronts  L2    predicted   before, us")
    for name, case in CASES.items():
        for kernel, work in kernels_of(name, case).items():
            costs, plan = planner.COSTS[kernel], plan_of(work, kernel)
            cycles = (planner.ISSUE, 1.0, planner.L2_BYTES)
            bounds = [
                turns(plan) * amount / rate / CLOCK
                for amount, rate in zip(planner.demands(plan, work, costs), cycles, strict=True)
            ]
            kind = f"{plan.kind.samples} in {'shared' if plan.kind.shared else 'L2'}"
            numbers = (*bounds, predicted(work, plan, kernel), before(work, kernel))
            print(f"{name} {kernel:17s}{kind:13s}" + "".join(f"{n:11.1f}" for n in numbers))
        saved = UNSTORED * case.rows * case.synapses / MEMORY
        few = whole_step(name, replace(case, batch=8))
        print(
            f"{name} step {whole_step(name, case):.1f} us, {few:.1f} with 8 samples; Adam where "
            f"the gradient is saves {saved:.1f}"
        )
    print(f"\nB forward with split somas: {split_somas(CASES['B']):.1f} us")
    print("\nforward of global fields       density   ours fp32   ours bf16   tensor cores, us")
    for name in "ABCD":
        case, kernel = CASES[name], "forward"
        half = plan_of(work_of(case, kernel, 2), kernel)
        ours = [
            predicted(w, plan_of(w, kernel), kernel)
            for w in (work_of(case, kernel, n) for n in (4, 2))
        ]
        share = density(case)
        tensor = on_tensor_cores(case, share, half)
        print(f"{name:28s}{share:11.2f}{ours[0]:11.1f}{ours[1]:11.1f}{tensor:11.1f}")


if __name__ == "__main__":
    main()
