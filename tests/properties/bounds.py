"""What a network computes, in dense float64 matrices, and how far a right result may be from it.

Independent of the package: masks, matrix products and the chain rule, written out. A result is a
sum of products. Added up in any order its error is at most gamma(n) = n u / (1 - n u) times the
same sum of absolute values, where u is the unit roundoff and n the number of roundings on the way
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). What else may differ is
`slack`: a derivative, where a sum is so close to a kink that rounding moves it across.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOW = torch.bfloat16, torch.float16
PIECEWISE = "leaky_relu", "relu", "identity"


class Sum(NamedTuple):
    """A sum of products in float64."""

    value: Tensor
    size: Tensor  # the same sum of absolute values
    slack: Tensor  # error beside that of rounding

    def __matmul__(self, other: Sum) -> Sum:
        value, size = self.value @ other.value, self.size @ other.size
        slack = torch.zeros_like(value)
        if self.slack.any():
            slack += self.slack @ other.size
        if other.slack.any():
            slack += (self.size + self.slack) @ other.slack
        return Sum(value, size, slack)

    def times(self, other: Sum) -> Sum:
        slack = self.slack * other.size + (self.size + self.slack) * other.slack
        return Sum(self.value * other.value, self.size * other.size, slack)

    def plus(self, other: Sum) -> Sum:
        return Sum(*(a + b for a, b in zip(self, other, strict=True)))

    def over_batch(self) -> Sum:
        return Sum(*(part.sum(0) for part in self))

    def transposed(self) -> Sum:
        return Sum(*(part.T for part in self))

    def at(self, mask: Tensor) -> Sum:
        return Sum(*(part[mask] for part in self))

    def shaped(self, shape: torch.Size) -> Sum:
        return Sum(*(part.reshape(shape) for part in self))


def given(values: Tensor) -> Sum:
    """Numbers that are there, without an error."""
    wide = values.detach().double()
    return Sum(wide, wide.abs(), torch.zeros_like(wide))


@dataclass
class Rounding:
    """Of results in a dtype.

    Args:
        dtype: of the results.
        length: how many roundings there are at most on the way to a result, one for each addition.
        stages: how many of them are to a low precision; 0: the results alone, rounded once.
        exact: all numbers are whole, and every sum is exact where it is not too large.
    """

    dtype: torch.dtype
    length: int
    stages: int
    exact: bool

    @property
    def gamma(self) -> float:
        if self.exact:
            return 0.0
        computed = torch.float32 if self.dtype in LOW else self.dtype
        low = _gamma(self.stages, self.dtype) if self.dtype in LOW else 0.0
        return _gamma(self.length, computed) + _gamma(self.length, torch.float64) + low

    def error(self, of: Sum) -> Tensor:
        return self.gamma * of.size + of.slack

    def fits(self, results: Sequence[Sum], quantum: float) -> bool:
        """Whether sums of multiples of `quantum` are exact."""
        digits = 53 if self.dtype == torch.float64 else 24
        return all(r.size.max() < 2**digits * quantum for r in results if r.size.numel())

    def check(self, name: str, got: Tensor, of: Sum) -> None:
        """AssertionError unless `got` is `of` within the bound, or its rounding where exact."""
        assert got.dtype == self.dtype, (name, got.dtype)
        assert got.shape == of.value.shape, (name, got.shape, of.value.shape)
        if self.exact:
            wrong = got != of.value.to(self.dtype)
        else:
            bound = self.error(of)
            if self.dtype in LOW:  # rounded once more, or below the smallest number
                info = torch.finfo(self.dtype)
                bound = bound + info.eps * (of.value.abs() + bound) + info.tiny * info.eps
            wrong = ~((got.double() - of.value).abs() <= bound)
        wrong &= of.size <= torch.finfo(self.dtype).max  # a larger sum may overflow on the way
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            one = got[tuple(where)].item(), of.value[tuple(where)].item()
            raise AssertionError(
                f"{name}{where}: Expected {one[1]!r}, got {one[0]!r} ({int(wrong.sum())} wrong)"
            )


def _gamma(n: int, dtype: torch.dtype) -> float:
    product = n * torch.finfo(dtype).eps / 2
    assert product < 0.5
    return product / (1 - product)


class Activation(NamedTuple):
    """By name: the function, how steep it is, and how steep its derivative."""

    name: str
    slope: float  # of leaky_relu

    def __call__(self, u: Tensor) -> Tensor:
        if self.name == "identity":
            return u
        if self.name == "leaky_relu":
            return torch.where(u > 0, u, self.slope * u)
        function: Any = getattr(F, self.name, None) or getattr(torch, self.name)
        y: Tensor = function(u)
        return y

    @property
    def kink(self) -> float:
        """How far the slopes on both sides of 0 are apart."""
        return {"leaky_relu": abs(1 - self.slope), "relu": 1.0}.get(self.name, 0.0)

    @property
    def steepest(self) -> float:
        """The largest |derivative|; that of gelu is 1.13, of silu 1.1."""
        return max(1.0, self.slope) if self.name in PIECEWISE else 1.2

    def of(self, u: Sum) -> Sum:
        value = self(u.value)
        least = self(torch.zeros((), dtype=torch.float64)).abs()
        return Sum(value, least + self.steepest * u.size, self.steepest * u.slack)

    def derivative(self, u: Sum, rounding: Rounding) -> Sum:
        leaf = u.value.clone().requires_grad_()
        (value,) = torch.autograd.grad(self(leaf).sum(), leaf)
        error = rounding.error(u)
        crossed = torch.where(u.value.abs() < error, self.kink, 0.0)
        bent = torch.zeros_like(error) if self.name in PIECEWISE else error
        slack = crossed + bent  # no second derivative is larger than 1
        return Sum(value, torch.full_like(value, self.steepest), slack)


class Level(NamedTuple):
    """Nodes: what they get from the level below, from the inputs, and what they make of it."""

    below: Tensor | None  # dense [nodes, nodes below]
    synapses: Tensor | None  # dense [nodes, N]
    bias: Tensor | None
    activation: Activation


class Gradients(NamedTuple):
    below: Sum | None
    synapses: Sum | None
    bias: Sum


class Results(NamedTuple):
    y: Sum  # [B, nodes of the last level]
    x: Sum  # gradients
    levels: list[Gradients]
    rounding: Rounding  # which says whether they are exact


def network(
    x: Tensor, levels: Sequence[Level], grad: Tensor, rounding: Rounding, rounds_x: bool
) -> Results:
    """y and all gradients of a network of levels, for x [B, N] and the gradient of y.

    `rounds_x`: forward may round x to bfloat16.
    """
    results = _network(x, levels, grad, rounding, rounds_x)
    if not rounding.exact:
        return results
    parts = [p for g in results.levels for p in g if p is not None]
    slopes = [level.activation.slope for level in levels if level.activation.name == "leaky_relu"]
    quantum = torch.tensor([s for s in slopes if 0 < s < 1]).prod().item() ** 2
    if rounding.fits([results.y, results.x, *parts], quantum):
        return results
    rounded = Rounding(rounding.dtype, rounding.length, rounding.stages, exact=False)
    return _network(x, levels, grad, rounded, rounds_x)


def _network(
    x: Tensor, levels: Sequence[Level], grad: Tensor, rounding: Rounding, rounds_x: bool
) -> Results:
    inputs = given(x)
    seen = inputs
    if rounds_x and not rounding.exact:
        seen = Sum(inputs.value, inputs.size, inputs.size * 2.0**-8)
    sums: list[Sum] = []
    outputs: list[Sum] = []
    for level in levels:
        nodes = next(m for m in (level.synapses, level.below) if m is not None).shape[0]
        v = given(x.new_zeros(len(x), nodes))
        if level.synapses is not None:
            v = v.plus(seen @ given(level.synapses).transposed())
        if level.below is not None:
            v = v.plus(outputs[-1] @ given(level.below).transposed())
        if level.bias is not None:
            v = v.plus(given(level.bias.expand_as(v.value)))
        sums.append(v)
        outputs.append(level.activation.of(v))
    at = given(grad)  # the outputs of a level
    dx = given(torch.zeros_like(x))
    found: list[Gradients] = []
    for i in reversed(range(len(levels))):
        level = levels[i]
        at = at.times(level.activation.derivative(sums[i], rounding))
        below = synapses = None
        bias = at.over_batch()
        if level.synapses is not None:
            synapses = at.transposed() @ seen  # kernels may take x as it is, or as forward saw it
            dx = dx.plus(at @ given(level.synapses))
        if level.below is not None:
            below = at.transposed() @ outputs[i - 1]
            at = at @ given(level.below)
        found.insert(0, Gradients(below, synapses, bias))
    return Results(outputs[-1], dx, found, rounding)
