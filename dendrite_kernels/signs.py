"""Excitatory and inhibitory weights: a parametrization for torch.nn.utils.parametrize."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ._modules import ordinary
from .structure import Connectivity

if TYPE_CHECKING:
    from typing_extensions import Self


class Signed(nn.Module):
    """Weights that keep their signs in training: sign * |raw|.

        from torch.nn.utils.parametrize import register_parametrization
        synapses = Signed.of_inputs(signs, layer.connectivity)
        register_parametrization(layer, "synapse_weight", synapses)
        register_parametrization(layer, "cable_weight", Signed(torch.ones(num_dendrites)))

    Registering it keeps the size of every weight and sets its sign. An optimizer must be made
    afterwards. Weight decay acts on the size. A weight may come to 0 but not through it; at 0 the
    derivative is the sign, so that it can grow again.

    Args:
        signs: of each weight, 1 (excitatory) or -1 (inhibitory), in the shape of the parameter and
            on its device.

    Raises:
        TypeError: signs that are no tensor.
        ValueError: other signs, a sparse tensor or one without values; in register_parametrization,
            another shape.
    """

    signs: torch.Tensor  # int8

    def __init__(self, signs: torch.Tensor) -> None:
        super().__init__()
        _check_tensor(signs)
        others = signs[(signs != 1) & (signs != -1)]
        if others.numel():
            raise ValueError(f"Expected signs 1 and -1, got {others[0].item()}")
        self.register_buffer("signs", signs.detach().to(torch.int8, copy=True))

    @classmethod
    def of_inputs(cls, signs: torch.Tensor, connectivity: Connectivity) -> Self:
        """For synapses, by Dale's law: all synapses of an input have its sign, signs [N]."""
        _check_tensor(signs)
        if signs.shape != (connectivity.in_features,):
            raise ValueError(
                f"Expected signs of shape [{connectivity.in_features}], got {list(signs.shape)}"
            )
        return cls(signs[connectivity.col_indices.to(signs.device).long()])

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """The weights: sign * |raw|."""
        return torch.where(raw < 0, -raw, raw) * self.signs

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The raw values of a weight, whose signs are ignored."""
        if weight.shape != self.signs.shape:
            raise ValueError(
                f"Expected a weight of shape {list(self.signs.shape)}, got {list(weight.shape)}"
            )
        return weight.abs()


def _check_tensor(signs: object) -> None:
    if not isinstance(signs, torch.Tensor):
        raise TypeError(f"Expected signs to be a tensor, got {type(signs).__name__}")
    ordinary("signs", signs)
