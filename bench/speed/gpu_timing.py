"""Times the CUDA backend on one GPU and compares it with hardware limits and peers.

    python -m bench.speed.gpu_timing --output timing.json [--cases A B C D G] [--seconds 150]

Results are compared with float64 first; a wrong one is not timed. Times are measured with CUDA
events: medians with the 20th and 80th percentile. A peer that fails is reported with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe
from bench.speed.gpu_problem import CASES, DENSE, OTHERS, Case, Step, adam, peers, training_step
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.protocol import Operands

TOLERANCE = {"bf16": 3e-2, "tf32": 5e-3}  # relative L2 error of y; others: 1e-5
SAMPLES = 50


def milliseconds(run: Step, limit: float = 3.0) -> dict[str, float]:
    """Percentiles of the time of one call on the current stream."""
    run()
    run()
    torch.cuda.synchronize()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < SAMPLES and (time.perf_counter() - started < limit or len(samples) < 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return {f"p{q}": float(np.percentile(samples, q)) for q in (20, 50, 80)}


def replayed(run: Step) -> Step:
    """The call as a CUDA graph, without gaps between launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def roofs() -> dict[str, float]:
    """Measured bandwidths (bytes read and written) and the shared-memory limit of gathers."""
    properties = torch.cuda.get_device_properties(0)
    large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    copy = torch.empty_like(large)
    memory = 2 * large.numel() / milliseconds(lambda: copy.copy_(large))["p50"] / 1e9
    small = large[: 8 << 20].view(torch.float32)
    target = torch.empty_like(small)

    def many() -> None:
        for _ in range(20):
            target.copy_(small)

    cache = 20 * 2 * small.nbytes / milliseconds(replayed(many))["p50"] / 1e9
    clock = getattr(properties, "clock_rate", 0) * 1e3 or 1.98e9
    sms = properties.multi_processor_count
    return {"memory_tb_s": memory, "l2_copy_tb_s": cache, "gather_tmac_s": 32 * sms * clock / 1e12}


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """TF32 products or bf16 autocast, as the name of a peer says."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name.endswith("tf32")
    with torch.autocast("cuda", torch.bfloat16, enabled=name.endswith("bf16")):
        yield
    torch.backends.cuda.matmul.allow_tf32 = was


def error_of(module: nn.Module, x: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        y = module(x[: len(wanted)]).double().cpu()
    return float((y - wanted).norm() / wanted.norm())


def float64(layer: dk.DendriticLayer, x: Tensor) -> Tensor:
    """y on the CPU in float64, synapse by synapse."""
    c = layer.connectivity
    leaves = {name: p.detach().double().cpu() for name, p in layer.named_parameters()}
    gathered = x.double().cpu()[:, c.col_indices.long()] * leaves["synapse_weight"]
    u = gathered.view(len(x), c.num_dendrites, -1).sum(-1) + leaves["dendrite_bias"]
    a = torch.where(u > 0, u, layer.negative_slope * u) * leaves["cable_weight"]
    v = a.view(len(x), c.num_somas, -1).sum(-1) + leaves["soma_bias"]
    return torch.where(v > 0, v, layer.negative_slope * v)


def measure_ours(case: Case, layer: dk.DendriticLayer, x: Tensor, grad: Tensor) -> dict[str, Any]:
    weight, dendrite_bias, cable, soma_bias = (p.detach() for p in layer.parameters())
    operands = Operands(weight, dendrite_bias, cable, soma_bias, layer.connectivity, 0.1, 0.1)

    def forward_of(x: Tensor) -> tuple[Tensor, Tensor]:
        return cuda.forward(x, operands, True, False)

    y, signs = forward_of(x)

    def backward(need_x: bool) -> Callable[[], object]:
        return lambda: cuda.backward(grad, x, y, signs, operands, need_x)

    runs: dict[str, Step] = {
        "forward": lambda: forward_of(x),
        "backward weight": backward(False),
        "backward": backward(True),
        "step": training_step(layer, adam(layer), x, grad),
    }
    if case.inputs * case.batch > 2**24:
        del runs["backward"]  # G is a first layer: its input needs no gradient
    found: dict[str, Any] = {name: milliseconds(run) for name, run in runs.items()}
    for name, run in runs.items():
        found[f"{name}, graph"] = milliseconds(replayed(run))
    half = x.bfloat16()
    found["forward bf16, graph"] = milliseconds(replayed(lambda: forward_of(half)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runs["step"]()
    torch.cuda.synchronize()
    found["step memory mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def measure_peer(
    name: str, make: Callable[[], nn.Module], x: Tensor, grad: Tensor, wanted: Tensor
) -> dict[str, Any]:
    with precision(name):
        module = make()
        error = error_of(module, x, wanted)
        limit = TOLERANCE.get(name.rsplit(" ", 1)[-1], 1e-5)
        if not error <= limit:
            return {"error": f"relative error {error:.1e}, more than {limit:.0e}: not timed"}
        torch.cuda.reset_peak_memory_stats()
        step = training_step(module, adam(module), x, grad)

        def forward() -> None:
            with torch.no_grad():
                module(x)

        found: dict[str, Any] = {"relative_error": error, "forward": milliseconds(forward)}
        found["step"] = milliseconds(step)
        found["peak memory mb"] = torch.cuda.max_memory_allocated() / 1e6
        return found


def prepare(case: Case) -> tuple[dk.DendriticLayer, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = case.layer()
    x = torch.randn(case.batch, case.inputs, device="cuda")
    return layer, x, torch.randn(case.batch, case.somas, device="cuda")


def measure_case(case: Case) -> dict[str, Any]:
    layer, x, grad = prepare(case)
    error = error_of(layer, x, float64(layer, x[:2]))
    if not error <= 1e-5:
        raise ArithmeticError(f"relative error {error:.1e}")
    ours = measure_ours(case, layer, x, grad)
    return {"sizes": vars(case), "relative_error": error, "ours": ours, "peers": {}}


def measure_peers(case: Case, names: Sequence[str], deadline: float) -> dict[str, Any]:
    if time.monotonic() > deadline:
        return {name: {"error": "no time left"} for name in names}
    layer, x, grad = prepare(case)
    wanted, makers = float64(layer, x[:2]), peers(layer)
    found: dict[str, Any] = {}
    for name in names:
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("no time left")
            found[name] = measure_peer(name, makers[name], x, grad, wanted)
        except Exception as fault:  # out of memory or unsupported: reported
            found[name] = {"error": f"{type(fault).__name__}: {fault}"[:200]}
        torch.cuda.empty_cache()
    return found


def report(name: str, case: Case, found: dict[str, Any], gather: float) -> None:
    ours = found["ours"]
    limit = case.macs / gather / 1e9  # ms
    best = ours["forward, graph"]["p50"]
    print(f"{name}: forward {best:.4f} ms, {limit / best:.0%} of the shared-memory limit")
    for key, value in ours.items():
        if isinstance(value, dict):
            print(f"   ours {key:28s}{value['p50']:10.4f} ms")
    for peer, entry in found["peers"].items():
        if "error" in entry:
            print(f"   {peer:33s}{entry['error'][:60]}")
        else:
            ratio = entry["step"]["p50"] / ours["step, graph"]["p50"]
            print(f"   {peer:33s}{entry['step']['p50']:10.4f} ms a step, {ratio:.1f}x ours")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
        "environment": describe(),
        "roofs": roofs(),
        "cases": {},
    }
    cases, failed = results["cases"], False

    def save() -> None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
        torch.cuda.empty_cache()

    for name in options.cases:
        try:
            cases[name] = measure_case(CASES[name])
        except Exception as fault:  # the other cases still count
            cases[name], failed = {"error": f"{type(fault).__name__}: {fault}"}, True
        save()
    for group in (DENSE, OTHERS):
        for name in options.cases:
            if "error" not in cases[name]:
                cases[name]["peers"].update(measure_peers(CASES[name], group, deadline))
                save()
    for name in options.cases:
        if "error" in cases[name]:
            print(f"{name}: {cases[name]['error']}")
        else:
            report(name, CASES[name], cases[name], results["roofs"]["gather_tmac_s"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
