"""k winners as a module."""

from __future__ import annotations

import numbers

import torch
from torch import nn

from . import functional


class KWinners(nn.Module):
    """The largest of the last dimension stay, all others become 0: [..., n] -> [..., n].

    Their number is round(fraction * n), at least 1, also where some are equal. Gradients go through
    the winners alone. There is no boosting.

    Args:
        fraction: above 0, up to 1.

    Raises:
        TypeError, ValueError: not such a fraction.

    Source: active dendrites (Iyer et al. 2022); docs/gates.md.
    """

    fraction: float

    def __init__(self, fraction: float) -> None:
        super().__init__()
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
            raise TypeError(f"Expected fraction to be a number, got {fraction!r}")
        if not 0 < fraction <= 1:
            raise ValueError(f"Expected fraction above 0, up to 1, got {fraction}")
        self.fraction = float(fraction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., n]."""
        (n,) = functional._require_tensor("x", x).shape[-1:] or (0,)
        return functional.k_winners(x, max(1, round(self.fraction * n)))

    def extra_repr(self) -> str:
        return f"{self.fraction:g}"
