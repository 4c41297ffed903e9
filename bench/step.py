"""Times one layer's forward + backward (with the input's gradient) against the masked-dense way.

    python -m bench.step [--somas 256 --dendrites 16 --synapses 16 --batch 128] [--threads 2]

All compute the same, which is checked first: without agreement nothing is reported. The masked-
dense way includes its gradient masks, once in the weights' dtype and once int64 as the official
code's; no side includes the optimizer. The sides take turns, so that another load on the machine
meets all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.environment import describe
from bench.masked_dense import MaskedDendriticLayer
from bench.report import write_json

TOLERANCE = 1e-5  # relative L2, float32
BLOCK = 10  # steps of one side in a row; the first is not counted, it finds the caches cold
RULES = {
    "random": lambda o: dk.connectivity.random(
        o.height * o.width, o.somas, o.dendrites, o.synapses, seed=o.seed
    ),
    "local": lambda o: dk.connectivity.local_receptive_fields(
        (o.height, o.width), o.somas, o.dendrites, o.synapses, seed=o.seed
    ),
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    results = {}
    for rule in options.rules:
        layer = dk.DendriticLayer(RULES[rule](options))
        twins = {
            "masked dense": MaskedDendriticLayer.from_layer(layer),
            "official": MaskedDendriticLayer.from_layer(layer, torch.int64),
        }
        x = torch.rand(options.batch, layer.connectivity.in_features)
        grad = torch.randn(options.batch, options.somas)
        error = max(largest_error(layer, twin, x, grad) for twin in twins.values())
        if not error <= TOLERANCE:
            print(f"{rule}: relative error {error:.1e}, more than {TOLERANCE:.0e}: not timed")
            return 1
        steps = {name: step(side, x, grad) for name, side in {"sparse": layer, **twins}.items()}
        times = take_turns(steps, options.rounds)
        ratio = {name: times[name]["p50"] / times["sparse"]["p50"] for name in twins}
        results[rule] = {"ms": times, "ratio": ratio, "relative_error": error}
        for name, ms in times.items():
            percentiles = "  ".join(f"{key} {value:8.3f} ms" for key, value in ms.items())
            print(f"{rule:8s}{name:14s}{percentiles}  {ms['p50'] / times['sparse']['p50']:6.1f}x")
    sizes = {key: value for key, value in vars(options).items() if isinstance(value, int)}
    write_json(options.output, {"sizes": sizes, "results": results, "environment": describe()})
    print(f"Wrote {options.output}")
    return 0


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward, backward with dx, and the gradient masks where there are any."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)
        if isinstance(layer, MaskedDendriticLayer):
            layer.mask_gradients()

    return run


def largest_error(
    layer: dk.DendriticLayer, twin: MaskedDendriticLayer, x: Tensor, grad: Tensor
) -> float:
    """The largest relative L2 difference of output, dx and parameter gradients."""
    parameters = dict(layer.named_parameters())
    pairs = []
    for module in (layer, twin):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        output = module(inputs)
        output.backward(grad)
        pairs.append([output.detach(), inputs.grad])
    weight, cable = twin.dendrite.weight.grad, twin.soma.weight.grad
    assert weight is not None
    assert cable is not None
    owner = torch.bucketize(
        torch.arange(len(weight)), layer.connectivity.soma_ptr[1:].long(), right=True
    )
    pairs[0] += [
        parameters[name].grad for name in ("synapse_weight", "cable_weight", "dendrite_bias")
    ]
    synapses = weight[twin.dendrite_mask != 0]  # row by row: the order of CSR
    pairs[1] += [synapses, cable[owner, torch.arange(len(owner))], twin.dendrite.bias.grad]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*pairs, strict=True))


def take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """ms of each step, 20th, 50th and 80th percentile."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            for i in range(BLOCK):
                started = time.perf_counter()
                run()
                elapsed = time.perf_counter() - started
                if turn and i:  # the first round warms up
                    times[name].append(1e3 * elapsed)
    return {
        name: {f"p{q}": float(np.percentile(ms, q)) for q in (20, 50, 80)}
        for name, ms in times.items()
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    sizes = {"batch": 128, "height": 28, "width": 28, "somas": 256, "dendrites": 16, "synapses": 16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--rounds", type=int, default=30, help=f"of {BLOCK} steps on each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--output", type=Path, default=Path("reports/step.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
