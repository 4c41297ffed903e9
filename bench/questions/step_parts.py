"""The parts of a whole training step: kernels, and the time between them.

    python -m bench.questions.step_parts [--case A] [--kind constant] [--threads 1 2] [--rounds 400]

Minima over rounds that call every part in turn. "kernels" is the sum of the kernels of the layer,
the loss and Adam, each called alone. The rest of a step is Python, autograd and allocations: of the
layer (forward and backward minus its kernels) and of torch (all else). Kernels fill the caches with
their data, so Python takes two or three times as long as in `overhead`. The 1 x 1 nn.Linear shows
how long torch alone takes under these conditions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.speed.cases import CASES
from bench.speed.kernels import Kernels
from dendrite_kernels.benchmark.case import KINDS
from dendrite_kernels.benchmark.problem import Problem
from dendrite_kernels.benchmark.whole_step import step_of

Run = Callable[[], object]
aten = torch.ops.aten


def parts(problem: Problem) -> dict[str, Run]:
    layer, kernels = problem.layer(), Kernels("cpp", problem)
    step = step_of(layer, problem)
    logits, one = kernels.run("forward")[0], torch.ones(())
    labels = torch.arange(len(problem.x)) % problem.connectivity.num_somas
    twins = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    for twin in twins:
        twin.grad = torch.randn_like(twin)
    adam = torch.optim.Adam(twins, lr=0.0, fused=True)
    adam.step()
    values = [twin.detach() for twin in twins]
    gradients = [twin.grad for twin in twins if twin.grad is not None]
    states = [adam.state[twin] for twin in twins]
    first, second, counts = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step"))
    tiny, grain = torch.nn.Linear(1, 1), torch.ones(1, 1)

    def forward_backward() -> None:
        layer(problem.x).backward(problem.grad)
        layer.zero_grad()

    def tiny_linear() -> None:
        tiny(grain).backward(grain)
        tiny.zero_grad()

    def loss() -> None:
        F.cross_entropy(logits.detach().requires_grad_(), labels).backward()

    def loss_kernels() -> None:
        log = aten._log_softmax(logits, 1, False)
        _, weight = aten.nll_loss_forward(log, labels, None, 1, -100)
        grad = aten.nll_loss_backward(one, log, labels, None, 1, -100, weight)
        aten._log_softmax_backward_data(grad, log, 1, torch.float32)

    def adam_kernel() -> None:
        torch._fused_adam_(
            values, gradients, first, second, [], counts, lr=0.0, beta1=0.9, beta2=0.999,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    return {
        "step": step,
        "layer": forward_backward,
        "forward kernel": lambda: kernels.run("forward"),
        "backward kernel": lambda: kernels.run("backward without dx"),
        "nn.Linear(1, 1)": tiny_linear,
        "loss": loss,
        "loss kernels": loss_kernels,
        "optimizer": adam.step,
        "optimizer kernel": adam_kernel,
    }


def measure(cases: dict[str, Run], rounds: int) -> dict[str, float]:
    """Microseconds: the minimum of rounds that visit every case in turn."""
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, run in cases.items():
            with torch.set_grad_enabled("kernel" not in name):
                start = time.perf_counter()
                run()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.step_parts", description=__doc__
    )
    parser.add_argument("--case", choices=CASES, default="A")
    parser.add_argument("--kind", choices=KINDS, default="constant")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    case = CASES[options.case]
    problem = Problem.draw(case.connectivity(options.kind), case.batch)
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = measure(parts(problem), options.rounds)
        kernels = sum(time_of_part for name, time_of_part in found.items() if "kernel" in name)
        print(f"{case}, {options.kind}, {threads} threads: us")
        for name, time_of_part in found.items():
            print(f"{time_of_part:10.1f}  {name}")
        between = found["layer"] - found["forward kernel"] - found["backward kernel"]
        print(f"{kernels:10.1f}  kernels in all; a step takes {found['step'] / kernels:.2f} of it")
        print(f"{between:10.1f}  of the layer, {found['step'] - kernels - between:.1f} of torch")


if __name__ == "__main__":
    main()
