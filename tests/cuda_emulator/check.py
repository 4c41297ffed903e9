"""Runs the CUDA backend on CPU tensors through the emulator and compares with the float64 oracle.

    python -m tests.cuda_emulator.check MODULE [--cases quick|all] [--orders 0 1 7]

Only the device is replaced: planner, packing, binding and kernels are those of the package. Results
must have the same bits for every order of threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import dendrite_kernels as dk
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.cuda import pack, plan
from dendrite_kernels.backends.protocol import AdamStep, Operands
from tests import oracle

TOLERANCE = {
    torch.float32: 1e-5,  # "one input" has sums that cancel
    torch.float64: 1e-14,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
Maybe = torch.Tensor | None
Draw = Callable[[], dk.Connectivity]


def _awkward() -> dk.Connectivity:
    """Empty rows, a soma without dendrites, rows of 1 to 21 synapses, an input without synapses."""
    columns = [[], [3], list(range(21)), [0, 5, 20], [], [7, 8, 9, 10, 11, 12, 13, 14], [20]]
    crow = [0]
    for row in columns:
        crow.append(crow[-1] + len(row))
    flat = [column for row in columns for column in row]
    return dk.Connectivity.from_csr(crow, flat, 23, soma_ptr=[0, 2, 2, 6, 7])


NETWORKS: dict[str, Draw] = {
    "awkward": _awkward,
    "constant": lambda: dk.connectivity.random(52, 5, 3, 16, constant_fan_in=True, seed=1),
    "wide soma": lambda: dk.connectivity.random(61, 3, 34, 5, seed=2),
    "odd": lambda: dk.connectivity.random(37, 3, 4, 9, seed=3),
    "one input": lambda: dk.connectivity.random(1, 1, 1, 1, constant_fan_in=True, seed=4),
    "bank": lambda: dk.connectivity.random(40, 4, 4, 32, constant_fan_in=True, seed=5),
    "32-bit": lambda: dk.connectivity.random(65600, 2, 2, 6, constant_fan_in=True, seed=6),
    "no synapse": lambda: dk.Connectivity.from_csr([0, 0, 0, 0], [], 5, soma_ptr=[0, 2, 3]),
    "many rows": lambda: dk.connectivity.random(20, 150, 2, 3, constant_fan_in=True, seed=7),
    "long rows": lambda: dk.connectivity.random(4500, 1, 4, 4000, seed=8),
    "few inputs": lambda: dk.connectivity.random(2, 160, 16, 2, seed=9),
}
# The results of these networks that are sums of thousands of products.
LONG_SUMS = {"long rows": ("y", "u"), "few inputs": ("dx", "sparse-dx")}
KINDS = dict(plan.KINDS)
L2 = -1  # the last kind of every dtype gathers from L2


@dataclass(frozen=True)
class Case:
    network: str
    batch: int
    kind: int | None = 0  # index in KINDS of the kind of tile to use; None: the planner chooses
    dtype: torch.dtype = torch.float32
    bias: bool = True
    slope: float = 0.1
    soma_slope: float = 0.3
    zeros: bool = False  # u is exactly 0 for many samples
    wide: bool = False  # indices of 32 bits, though 16 were enough
    distant: bool = False  # sign bits are not staged in shared memory


QUICK = [
    Case("awkward", 33),
    Case("awkward", 5, bias=False, slope=0.0),
    Case("constant", 65, 1, zeros=True, bias=False),
    Case("constant", 40, 1, torch.bfloat16),
    Case("constant", 70, 2, torch.bfloat16),
    Case("bank", 40, 3),
    Case("odd", 20, 2),
    Case("no synapse", 12, None),
    Case("odd", 70, L2),
    Case("odd", 9, None, torch.float64),
    Case("wide soma", 20, 3, torch.float16),
]
ALL = [
    *QUICK,
    *(
        Case(name, batch, kind, dtype)
        for dtype in TOLERANCE
        for kind in range(len(KINDS[dtype.itemsize]))
        for name, batch in [("awkward", 63), ("bank", 130), ("odd", 65), ("one input", 64)]
    ),
    *(Case("odd", batch, None, dtype) for dtype in TOLERANCE for batch in (1, 8)),
    *(
        Case("odd", batch, kind, dtype, wide=True)
        for dtype in TOLERANCE
        for batch, kind in [(1, L2), (8, L2), (70, L2)]
    ),
    *(
        Case("odd", 65, kind, dtype, distant=True)
        for dtype in TOLERANCE
        for kind in range(len(KINDS[max(4, dtype.itemsize)]) - 1)
    ),
    Case("wide soma", 1, None), Case("wide soma", 64, 2), Case("many rows", 33, None),
    Case("many rows", 70, 3), Case("constant", 128, None, bias=False, slope=1.0),
    Case("32-bit", 3, None),
]  # fmt: skip
LONG = [Case("long rows", 4, None)]
LONGER = [Case("long rows", 33, L2), Case("few inputs", 33, L2)]
# 65,600 inputs: millions of emulated threads.
WIDE = [Case("32-bit", 9, L2), Case("32-bit", 9, L2, torch.bfloat16)]


def load(path: str) -> Any:
    """Make the CUDA backend use the emulator."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.configure(torch.Tensor.__dlpack_c_exchange_api__)
    limits = plan.Limits(3, 99 << 10, 100 << 10, 4 << 20)
    replaced: dict[str, Any] = {
        "_load": lambda: (module, None),
        "_stream": lambda device: 0,
        "_limits": lambda index: limits,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    return module


def run(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """All results of the backend; inputs are drawn with a fixed seed."""
    allow_kind(case.kind)
    widen_indices(case.wide)
    keep_signs_distant(case.distant)
    c, x, parameters, grad, grad_u = inputs(case)
    x, grad, grad_u = x.to(device), grad.to(device), grad_u.to(device)
    weight, dendrite_bias, cable, soma_bias = (
        None if t is None else t.to(device) for t in parameters
    )
    assert weight is not None
    assert cable is not None
    layer = Operands(weight, dendrite_bias, cable, soma_bias, c, case.slope, case.soma_slope)
    linear = Operands(weight, dendrite_bias, None, None, c, 1.0, 1.0)
    y, signs = cuda.forward(x, layer, True, False)
    gradients = cuda.backward(grad, x, y, signs, layer, True)
    u, _ = cuda.forward(x, linear, False, False)
    results = [y, *gradients, u, *cuda.backward(grad_u, x, None, None, linear, True)[:3]]
    averages = [t.to(device) for t in averages_of(case, c.nnz)]
    weight = weight.to(averages[0].dtype, copy=True)  # sums' own: other weights are not stepped
    step = torch.tensor(3.0, device=device)
    of_sums = [None if t is None else t.to(weight.dtype) for t in (dendrite_bias, cable)]
    operands = Operands(weight, *of_sums, None, c, case.slope, case.soma_slope)
    stepped = cuda.backward(
        grad, x, y, signs, operands, True, AdamStep(*averages, step, **adam_options(case))
    )
    return [
        t.cpu() for t in [*results, weight, *averages, *stepped[:1], *stepped[3:4], _bits(signs, x)]
    ]


def adam_options(case: Case) -> dict[str, Any]:
    return {
        "lr": 0.01, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.2,
        "decoupled": not case.bias,
    }  # fmt: skip


def averages_of(case: Case, size: int) -> list[torch.Tensor]:
    """Adam's averages before the step; large ones, so that rounding cannot turn the step around."""
    generator = torch.Generator().manual_seed(case.batch)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    exp_avg = torch.randn(size, generator=generator, dtype=dtype)
    return [exp_avg, 1 + torch.rand(size, generator=generator, dtype=dtype)]


def adam(case: Case, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Weight and averages after torch's step number 4."""
    parameter = torch.nn.Parameter(weight.detach().clone())
    parameter.grad = grad
    options = adam_options(case)
    betas = options.pop("beta1"), options.pop("beta2")
    kind = torch.optim.AdamW if options.pop("decoupled") else torch.optim.Adam
    optimizer = kind([parameter], betas=betas, **options)
    exp_avg, exp_avg_sq = (t.to(weight) for t in averages_of(case, weight.numel()))
    optimizer.state[parameter] = {
        "step": torch.tensor(3.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq,
    }  # fmt: skip
    optimizer.step()
    return [parameter.detach(), exp_avg, exp_avg_sq]


def allow_kind(kind: int | None) -> None:
    """Restrict the planner to this kind of tile; None: all kinds."""
    for size, kinds in KINDS.items():
        only = kinds if kind is None else kinds[kind:][:1] or kinds[-1:]
        plan.KINDS[size] = only
    plan.plan_tiles.cache_clear()
    plan.plan_weight.cache_clear()


THAT_FIT = plan.tiles_that_fit


def keep_signs_distant(on: bool) -> None:
    """Leave sign bits in global memory, or as the planner does."""

    def distant(work: plan.Work, limits: plan.Limits) -> list[tuple[plan.Kind, int, bool]]:
        found = THAT_FIT(work, limits)
        tile = plan.tile_bytes
        return [(kind, tile(kind, work) if kind.shared else 0, False) for kind, _, _ in found]

    plan.tiles_that_fit = distant if on else THAT_FIT
    plan.plan_tiles.cache_clear()


PACK = {name: getattr(pack, name) for name in ("pack_rows", "pack_columns")}


def widen_indices(on: bool) -> None:
    """Pack all indices in 32 bits, or as the package does."""

    def wide(make: Callable[..., pack.Packing]) -> Callable[..., pack.Packing]:
        def make_wide(*arguments: Any) -> pack.Packing:
            packing = make(*arguments)
            index = packing.index
            if index.dtype == np.int16:
                index = index.view(np.uint16).astype(np.int32)
            return replace(packing, index=index)

        return make_wide

    for name, make in PACK.items():
        setattr(pack, name, wide(make) if on else make)


def inputs(
    case: Case,
) -> tuple[dk.Connectivity, torch.Tensor, list[Maybe], torch.Tensor, torch.Tensor]:
    torch.manual_seed(case.batch)
    c = NETWORKS[case.network]()
    x = torch.randn(case.batch, c.in_features)
    if case.zeros:
        x[::2] = 0
    sizes = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    parameters: list[Maybe] = [torch.randn(size).to(case.dtype) for size in sizes]
    if not case.bias:
        parameters[1] = parameters[3] = None
    grad, grad_u = (
        torch.randn(case.batch, size).to(case.dtype) for size in (c.num_somas, c.num_dendrites)
    )
    return c, x.to(case.dtype), parameters, grad, grad_u


def _bits(signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sign words -> [B, R] of 0 and 1."""
    place = torch.arange(32, dtype=torch.int32, device=signs.device).reshape(1, 32, 1)
    return (signs[:, None, :] >> place & 1).reshape(-1, signs.shape[1])[: x.shape[0]]


def expected(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    return results_of(case, oracle.dendritic_layer, oracle.sparse_linear, torch.float64, device)


def plain_torch(case: Case) -> list[torch.Tensor]:
    """The same results from plain PyTorch, in the same dtype."""

    def layer(x: Any, weight: Any, bias: Any, cable: Any, soma_bias: Any, c: Any, *_: float) -> Any:
        u = dk.reference.sparse_linear(x, weight, bias, c)
        v = dk.reference.cable(F.leaky_relu(u, case.slope), cable, soma_bias, c)
        return F.leaky_relu(v, case.soma_slope)

    return results_of(case, layer, dk.reference.sparse_linear, case.dtype)


def results_of(
    case: Case,
    dendritic_layer: Callable[..., torch.Tensor],
    sparse_linear: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """The same results as `run` returns, computed by differentiable functions on a device."""
    c, x, parameters, grad, grad_u = inputs(case)
    grad, grad_u = (t.to(device, dtype) for t in (grad, grad_u))
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in (x, *parameters)]
    leaf, weight, dendrite_bias, cable, soma_bias = leaves
    assert leaf is not None
    assert weight is not None
    slopes = case.slope, case.soma_slope
    y = dendritic_layer(leaf, weight, dendrite_bias, cable, soma_bias, c, *slopes)
    u = sparse_linear(leaf, weight, dendrite_bias, c)
    gradients = torch.autograd.grad(
        y, [t for t in leaves if t is not None], grad, allow_unused=True
    )
    found = iter(gradients)
    full = [torch.zeros(0) if t is None else next(found) for t in leaves]
    sparse = torch.autograd.grad(u, (leaf, weight), grad_u)
    bits = (u > 0).int()
    stepped = [*adam(case, weight, full[1]), full[0], full[3]]
    results = [y.detach(), *full, u.detach(), *sparse, grad_u.sum(0), *stepped, bits]
    return [t.cpu() for t in results]


NAMES = [
    *("y", "dx", "dw", "dbd", "dc", "dbs"),
    *("u", "sparse-dx", "sparse-dw", "sparse-db"),
    *("weight", "exp_avg", "exp_avg_sq", "stepped-dx", "stepped-dc", "signs"),
]


def faults(case: Case, results: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[str]:
    """Messages about results that are too far from those of the oracle."""
    found = []
    for name, got, want in zip(NAMES, results, wanted, strict=True):
        if want.numel() == 0 and want.shape != got.shape:
            continue  # no bias: its gradient is computed but has no counterpart
        tolerance = TOLERANCE[case.dtype]
        if name == "signs":
            # Rounding decides the sign of sums next to zero.
            tolerance = 0.0 if case.zeros else 20 * tolerance
        error = oracle.relative_error(got, want)
        if not error <= tolerance:
            found.append(f"{name}: error {error:.1e}")
    return found + inexact_sums(case, results, wanted)


def inexact_sums(case: Case, results: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[str]:
    """Messages about long sums with more than twice the error of plain torch in this dtype."""
    names = LONG_SUMS.get(case.network, ())
    plain = plain_torch(case) if names else []
    found = []
    for name in names:
        place = NAMES.index(name)
        error, allowed = (
            oracle.relative_error(got[place], wanted[place]) for got in (results, plain)
        )
        if not error <= 2 * allowed:
            found.append(f"{name}: error {error:.1e}, plain torch's {allowed:.1e}")
    return found


def check(case: Case, orders: list[int], module: Any) -> list[str]:
    """Messages about all faults of a case, in these orders of threads."""
    wanted = expected(case)
    found = []
    first: list[torch.Tensor] = []
    for order in orders:
        module.set_order(order)
        results = run(case)
        first = first or results
        found += [f"order {order}: {fault}" for fault in faults(case, results, wanted)]
        for name, got, before in zip(NAMES, results, first, strict=True):
            if not torch.equal(got, before):
                found.append(f"{name}: depends on the order of threads ({order})")
    return found


def poison(on: bool) -> None:
    """Fill what torch leaves uninitialised with NaN."""
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = on


def selected(cases: str, orders: list[int]) -> list[tuple[Case, list[int]]]:
    """The quick cases or all of them, and the orders to run each in."""
    short, slow = (QUICK, LONG) if cases == "quick" else (ALL, [*LONG, *LONGER, *WIDE])
    one = orders[:1]  # for those that take seconds
    return [*((case, orders) for case in short), *((case, one) for case in slow)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--cases", choices=["quick", "all"], default="quick")
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 7])
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    poison(True)
    torch.set_num_threads(1)
    module = load(options.module)
    wrong = 0
    for case, orders in selected(options.cases, options.orders):
        for fault in check(case, orders, module):
            wrong += 1
            print(f"{case}: {fault}")
    print("all good" if not wrong else f"{wrong} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
