"""Fuzz target: the C++ binding gets tensors that do not fit, and refuses them, or computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.backends import cpp
from tests import oracle
from tests.fuzz.source import Source
from tests.networks import small

Named = dict[str, Any]
TYPES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BATCHES = 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130
FENCE = 64  # numbers before and after a result
OPTIONAL = "dendrite_bias", "soma_bias", "dx"
FORWARD = (
    "x", "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias", "slope", "soma_slope",
    "round_x", "y", "signs", "threads",
)  # fmt: skip
BACKWARD = (
    "grad", "x", "y", "signs", "synapse_weight", "dendrite_bias", "cable_weight", "slope",
    "soma_slope", "dx", "dw", "dbd", "dc", "dbs", "threads",
)  # fmt: skip
RESULTS = {"forward": ("y",), "backward": ("dx", "dw", "dbd", "dc", "dbs")}
CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t[..., 1:].contiguous(),
    lambda t: t[:1],
    lambda t: t[None],
    lambda t: t.reshape(-1),
    lambda t: torch.cat([t, t]),
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda t: t[:1].expand(t.shape),
    lambda t: t.new_zeros(1).as_strided(t.shape, [0] * t.dim()),
    lambda t: t.new_empty(0),
    lambda t: t.double(),
    lambda t: t.float(),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.numpy() if t.dtype != torch.bfloat16 else 3,
    lambda t: t.tolist(),
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t: torch.nn.Parameter(t, t.is_floating_point()),
    lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].reshape(t.shape),  # another alignment
    lambda t: "text",
    lambda t: None,
]
NUMBERS: dict[str, tuple[Any, ...]] = {
    "slope": (0.0, 1.0, 3.0, -1.0, math.inf, math.nan, 1e300, True, "1", None, 10**400),
    "threads": (1, 3, 64, 0, -1, 2**31 - 1, -(2**31), 2**31, 2**70, 1.5, None),
    "round_x": (True, None, 2, "x"),
}
NUMBERS["soma_slope"] = NUMBERS["slope"]


@functools.cache
def networks() -> list[Connectivity]:
    dk.use_backend("cpp")  # configures the module
    torch.set_num_threads(2)
    fields = dk.connectivity.local_receptive_fields((6, 5), 9, 2, 4, seed=0)
    return [small(), dk.connectivity.random(40, 3, 5, 4, seed=0), fields]


def fenced(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = torch.full((math.prod(shape) + 2 * FENCE,), 7, dtype=dtype)
    return flat[FENCE : flat.numel() - FENCE].view(shape)


def fence_of(t: Tensor) -> Tensor:
    flat = t.new_empty(0).set_(t.untyped_storage())
    return torch.cat([flat[:FENCE], flat[flat.numel() - FENCE :]])


def good_call(source: Source, c: Connectivity, kind: str, somas: bool) -> Named:
    """Arguments that fit."""
    batch, dtype = source.pick(BATCHES), source.pick(tuple(TYPES))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    outputs = c.num_somas if somas else c.num_dendrites
    rows = c.num_dendrites
    call: Named = {
        "x": torch.randn(batch, c.in_features).to(dtype),
        "synapse_weight": torch.randn(c.nnz, dtype=wide),
        "dendrite_bias": source.pick((None, torch.randn(rows, dtype=wide))),
        "cable_weight": torch.randn(rows, dtype=wide) if somas else None,
        "soma_bias": source.pick((None, torch.randn(c.num_somas, dtype=wide))) if somas else None,
        "slope": 0.25,
        "soma_slope": 0.5,
        "round_x": False,
        "y": fenced((batch, outputs), dtype),
        "signs": torch.empty((batch + 31) // 32, rows, dtype=torch.int32),
        "threads": 1 + source.below(3),
    }
    if kind == "backward":
        run("forward", cpp._topology(c) if not somas else cpp._by_centre(c), call)
        call |= {
            "grad": torch.randn(batch, outputs).to(dtype),
            "dx": fenced((batch, c.in_features), dtype),
            "dw": fenced((c.nnz,), wide),
            "dbd": fenced((rows,), wide),
            "dc": fenced((rows,), wide) if somas else None,
            "dbs": fenced((c.num_somas,), wide) if somas else None,
        }
        if not somas:
            call |= {"y": None, "signs": None}
        if source.below(2):
            call["dx"] = None
    return call


def run(kind: str, topology: Any, call: Named) -> None:
    names = FORWARD if kind == "forward" else BACKWARD
    getattr(cpp._load()[0], kind)(topology, *(call[name] for name in names))


def topology_of(c: Connectivity, kind: str, somas: bool, call: Named) -> Any:
    if kind == "backward" and call["dx"] is not None:
        return cpp._transposed(c)
    if somas:
        return cpp._by_centre(c)
    return cpp._forward_rows(c) if kind == "forward" else cpp._topology(c)


def fits(good: Any, got: Any) -> bool:
    if not isinstance(good, Tensor):
        return got is good
    if not isinstance(got, Tensor) or got.device.type != "cpu" or got.layout != torch.strided:
        return False
    same = got.dtype == good.dtype and got.shape == good.shape and got.is_contiguous()
    return same and not got._is_zerotensor()


def is_optional(name: str, kind: str) -> bool:
    return name in OPTIONAL or (name == "signs" and kind == "forward")


def binding(data: bytes) -> None:
    """It raises if something does not fit, else its results are those of the oracle."""
    source = Source(data)
    c, kind, somas = source.pick(networks()), source.pick(tuple(RESULTS)), bool(source.below(2))
    good = good_call(source, c, kind, somas)
    call, names = dict(good), FORWARD if kind == "forward" else BACKWARD
    name = source.pick(names)  # one only: two could fit each other
    if name in NUMBERS:
        call[name] = source.pick(NUMBERS[name])
    elif isinstance(call[name], Tensor):
        call[name] = source.pick(CHANGES)(call[name])
    wrong = [
        name
        for name in names
        if name not in NUMBERS
        and not fits(good[name], call[name])
        and not (call[name] is None and is_optional(name, kind))
    ]
    odd = any(call[name] is not good[name] for name in NUMBERS if name in names)
    try:
        run(kind, topology_of(c, kind, somas, good), call)
    except (ValueError, TypeError, RuntimeError):
        assert wrong or odd, "refused what fits"
        return
    assert not wrong, f"took {wrong}"
    results = [name for name in RESULTS[kind] if call[name] is not None]
    assert all(bool((fence_of(good[name]) == 7).all()) for name in results), "wrote beside one"
    if is_comparable(call) and (kind == "forward" or is_forward_of(call, good)):
        bound = TYPES[call["x"].dtype]
        for name, expected in zip(results, oracle_of(kind, c, call, results), strict=True):
            assert oracle.relative_error(call[name].detach(), expected) < bound, name


def is_comparable(call: Named) -> bool:
    slopes = call["slope"], call["soma_slope"]
    return all(type(s) is float and 0 <= s < 10 for s in slopes) and not call["round_x"]


def is_forward_of(call: Named, good: Named) -> bool:
    """Whether y and signs are those of the other arguments."""
    same_slopes = call["slope"] == good["slope"] and call["soma_slope"] == good["soma_slope"]
    return same_slopes and (call["dendrite_bias"] is None) == (good["dendrite_bias"] is None)


def oracle_of(kind: str, c: Connectivity, call: Named, results: list[str]) -> list[Tensor]:
    operands = "x", "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias"
    x, weight, dendrite_bias, cable, soma_bias = (
        None if call[name] is None else call[name].detach().double().requires_grad_()
        for name in operands
    )
    if kind == "backward":  # biases that are not there have gradients too
        dendrite_bias = needed(dendrite_bias, c.num_dendrites)
        soma_bias = needed(soma_bias, c.num_somas)
    if cable is None:
        y = oracle.sparse_linear(x, weight, dendrite_bias, c)
    else:
        slopes = call["slope"], call["soma_slope"]
        y = oracle.dendritic_layer(x, weight, dendrite_bias, cable, soma_bias, c, *slopes)
    if kind == "forward":
        return [y.detach()]
    leaves = dict(
        zip(RESULTS["backward"], (x, weight, dendrite_bias, cable, soma_bias), strict=True)
    )
    wanted = [leaves[name] for name in results]
    return list(torch.autograd.grad(y, wanted, call["grad"].detach().double()))


def needed(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, requires_grad=True) if bias is None else bias
