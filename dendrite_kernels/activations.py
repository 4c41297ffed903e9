"""Activations by name, of dendrites and somas: the only table of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]
ActivationName = Literal["leaky_relu", "relu", "identity", "tanh", "sigmoid", "gelu", "silu", "elu"]

# The slope left of 0 of those that are piecewise linear through the origin (u right of it), None
# for the others; and the function. leaky_relu is not here, since its slope is an argument.
# With a slope, a layer runs as one fused kernel, whose backward reads the sign of a soma's sum off
# the sign of y. So no slope may be negative: y would be positive on both sides.
_TABLE: dict[str, tuple[float | None, Activation]] = {
    "relu": (0.0, torch.relu),
    "identity": (1.0, lambda u: u),
    "tanh": (None, torch.tanh),
    "sigmoid": (None, torch.sigmoid),
    "gelu": (None, F.gelu),
    "silu": (None, F.silu),
    "elu": (None, F.elu),
}


def _row(name: str) -> tuple[float | None, Activation]:
    if name not in _TABLE:
        raise ValueError(
            f"Expected an activation of {sorted(['leaky_relu', *_TABLE])}, got {name!r}"
        )
    return _TABLE[name]


def slope_of(name: str, negative_slope: float) -> float | None:
    """The slope left of 0, None where there is none.

    ValueError for an unknown activation, and for a slope that is negative or not finite.
    """
    slope = negative_slope if name == "leaky_relu" else _row(name)[0]
    if slope is not None:
        check_slope(slope)
    return slope


def function_of(name: str, negative_slope: float) -> Activation:
    """The elementwise function; ValueError for an unknown activation."""
    if name == "leaky_relu":
        return lambda u: F.leaky_relu(u, negative_slope)
    return _row(name)[1]


def check_slope(slope: float) -> None:
    """ValueError unless the slope is finite and not negative."""
    if not 0 <= slope < math.inf:
        raise ValueError(
            f"Expected a finite negative_slope >= 0, got {slope}: backward takes the sign of y for"
            " that of the soma's sum"
        )
