"""The overhead of one call: tiny layers compared with those of torch, eager and compiled.

    python -m bench.questions.overhead [numba] [--output FILE]

Times are CPU times of the calling thread, because they depend little on other load. Each is the
minimum over rounds that call every case in turn. For C++ a second table has the parts of an eager
call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import dendrite_kernels as dk
from bench.environment import describe_run, write_json
from dendrite_kernels import autograd, fast_path, operators
from dendrite_kernels.backends import BackendName

BATCH, REPEATS, CALLS = 4, 100, 100
Run = Callable[[], object]
Model = tuple[Callable[[torch.Tensor], torch.Tensor], list[nn.Parameter]]

CONNECTIVITY = dk.connectivity.random(16, 4, 2, 4, constant_fan_in=True, seed=0)


def models() -> dict[str, Model]:
    c = CONNECTIVITY
    linear, sparse, dendritic = nn.Linear(16, 4), dk.SparseLinear(c), dk.DendriticLayer(c)
    a, b, p = ([*module.parameters()] for module in (linear, sparse, dendritic))
    return {
        "F.linear": (lambda x: F.linear(x, a[0], a[1]), a),
        "sparse_linear": (lambda x: dk.functional.sparse_linear(x, b[0], b[1], c), b),
        "dendritic_layer": (
            lambda x: dk.functional.dendritic_layer(x, p[0], p[1], p[2], p[3], c),
            p,
        ),
        "nn.Linear": (linear, a),
        "SparseLinear": (sparse, b),
        "DendriticLayer": (dendritic, p),
    }


def without_gradients(model: Model, x: torch.Tensor) -> Run:
    run, _ = model

    def call() -> None:
        with torch.no_grad():
            run(x)

    return call


def forward(model: Model, x: torch.Tensor) -> Run:
    run, _ = model
    return lambda: run(x)


def forward_backward(model: Model, x: torch.Tensor) -> Run:
    run, parameters = model
    x = x.clone().requires_grad_()
    grad = torch.ones_like(run(x))

    def call() -> None:
        run(x).backward(grad)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return call


WAYS = {"no grad": without_gradients, "forward": forward, "forward+backward": forward_backward}


def nothing() -> None:
    with torch.no_grad():
        pass


def parts() -> dict[str, Run]:
    """The parts of a call of `dendritic_layer`, each timed alone."""
    c, x = CONNECTIVITY, torch.randn(BATCH, 16)
    w, dendrite_bias, cable, soma_bias = (p for p in dk.DendriticLayer(c).parameters())
    operands = x, w, dendrite_bias, cable, soma_bias
    topology: Any = fast_path.topology_of(c, True)
    y, signs = topology.forward(*operands, 0.1, 0.1, True)
    grad = torch.ones_like(y)
    backward, indices = (x, y, signs, w, dendrite_bias, cable), operators.index_tensors(c)
    record = autograd._record
    return {
        "look up the topology": lambda: fast_path.topology_of(c, True),
        "check the operands": lambda: topology.accepts(*operands),
        "forward": lambda: topology.forward(*operands, 0.1, 0.1, False),
        "forward that saves signs": lambda: topology.forward(*operands, 0.1, 0.1, True),
        "the same in an autograd.Function": lambda: record(*operands, (c, (0.1, 0.1), topology)),
        "backward": lambda: operators.backward(grad, *backward, *indices, 0.1, 0.1, True),
    }


def measure(cases: dict[str, Run]) -> dict[str, float]:
    """Microseconds per call: the minimum of rounds that visit every case in turn."""
    for run in cases.values():
        for _ in range(20):
            run()
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(REPEATS):
        for name, run in cases.items():
            run()
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            best[name] = min(best[name], (time.thread_time() - start) / CALLS * 1e6)
    return best


def overhead(backend: BackendName) -> dict[str, Any]:
    """Microseconds of every layer's calls on the backend in use, for C++ also of a call's parts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, 16)
    cases: dict[str, Run] = {"nothing": nothing}
    for mode in ("", "compiled "):
        for name, (run, parameters) in models().items():
            called = torch.compile(run, fullgraph=True) if mode else run
            for way, build in WAYS.items():
                cases[f"{name}|{mode}{way}"] = build((called, parameters), x)
    found = measure(cases)
    layers: dict[str, dict[str, float]] = {}
    for case in [*cases][1:]:
        name, way = case.split("|")
        us = found[case] - found["nothing"] * way.endswith("no grad")
        layers.setdefault(name, {})[way] = us
    return {
        "backend": backend,
        "batch": BATCH,
        "layers_us": layers,
        "aim_us": {way: 3 + 1.6 * us for way, us in layers["F.linear"].items()},
        "parts_us": measure(parts()) if backend == "cpp" else {},
    }


def print_overhead(report: dict[str, Any]) -> None:
    cpu, versions = report["environment"]["cpu"], report["environment"]["versions"]
    print(f"us per call; {report['backend']}, batch {BATCH}, torch {versions['torch']}, {cpu}")
    rows = [*report["layers_us"].items(), ("3 + 1.6 F.linear", report["aim_us"])]
    head = "", *report["aim_us"]
    print(tabulate([(name, *us.values()) for name, us in rows], head, "plain", floatfmt=".1f"))
    if report["parts_us"]:
        print("\nus of the parts of dendritic_layer")
        print(tabulate(report["parts_us"].items(), tablefmt="plain", floatfmt=".1f"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.questions.overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("backend", nargs="?", choices=get_args(BackendName), default="cpp")
    parser.add_argument("--output", type=Path, help="a JSON file to write as well")
    options = parser.parse_args(arguments)
    with dk.use_backend(options.backend):
        report = {**describe_run(parser, arguments, 1), **overhead(options.backend)}
    print_overhead(report)
    if options.output:
        write_json(options.output, report, digits=4)
        print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
