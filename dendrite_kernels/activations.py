"""Activations by name, of dendrites and somas: the only table of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]
ActivationName = Literal["leaky_relu", "relu", "identity", "tanh", "sigmoid", "gelu", "silu", "elu"]
_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)


def _identity(u: torch.Tensor) -> torch.Tensor:  # a lambda, torch.jit.script does not compile
    return u


# The slope left of 0 of those that are piecewise linear through the origin (u right of it), None
# for the others; and the function. leaky_relu is not here, since its slope is an argument.
# With a slope, a layer runs as one fused kernel, whose backward reads the sign of a soma's sum off
# the sign of y. So no slope may be negative: y would be positive on both sides.
_TABLE: dict[str, tuple[float | None, Activation]] = {
    "relu": (0.0, torch.relu),
    "identity": (1.0, _identity),
    "tanh": (None, torch.tanh),
    "sigmoid": (None, torch.sigmoid),
    "gelu": (None, F.gelu),
    "silu": (None, F.silu),
    "elu": (None, F.elu),
}


def _row(name: str) -> tuple[float | None, Activation]:
    if not isinstance(name, str) or name not in _TABLE:
        raise ValueError(
            f"Expected an activation of {sorted(['leaky_relu', *_TABLE])}, got {name!r}"
        )
    return _TABLE[name]


def slope_of(name: str, negative_slope: float) -> float | None:
    """The slope left of 0, None where there is none; negative_slope has passed `check_slope`.

    ValueError for an unknown activation.
    """
    if name == "leaky_relu":
        return negative_slope
    slope = _row(name)[0]
    if slope is not None:
        check_slope(slope)
    return slope


def slopes_of(
    activation: str, soma_activation: str | None, negative_slope: float
) -> tuple[float, float] | None:
    """The slopes of dendrites and somas, None if one of them has none.

    ValueError for an unknown activation, errors of `check_slope` for the slope.
    """
    check_slope(negative_slope)
    slope = slope_of(activation, negative_slope)
    soma_slope = slope if soma_activation is None else slope_of(soma_activation, negative_slope)
    return None if slope is None or soma_slope is None else (slope, soma_slope)


def function_of(name: str, negative_slope: float) -> Activation:
    """The elementwise function; ValueError for an unknown activation."""
    if name == "leaky_relu":
        return lambda u: F.leaky_relu(u, negative_slope)
    return _row(name)[1]


def check_slope(slope: float) -> None:
    """TypeError unless the slope is a number, ValueError unless it is finite and not negative."""
    if type(slope) is not float and (isinstance(slope, bool) or not isinstance(slope, _NUMBERS)):
        raise TypeError(
            f"Expected negative_slope to be a number, got {type(slope).__name__}: it is not learned"
        )
    if not 0 <= slope < math.inf:
        raise ValueError(
            f"Expected a finite negative_slope >= 0, got {slope}: backward takes the sign of y for"
            " that of the soma's sum"
        )
