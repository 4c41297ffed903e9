"""Neurons of conductances: excitation drives a membrane, inhibition divides (shunting).

    layer = dk.models.shunting.ShuntingLayer(excitation, inhibition)  # two Connectivities
    y = layer(x)  # or layer(x_e, x_i)

Source: docs/neurons.md.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.utils.parametrize import register_parametrization

from . import connectivity, operators
from ._validate import check_size
from .nn import SparseLinear
from .structure import Connectivity

__all__ = ["Conductance", "ShuntingLayer", "build"]

_EXCITATION, _INHIBITION = 2.0, 1.0  # means of E and I at first: V = E / (1 + E + I) = 1/2


class Conductance(nn.Module):
    """Weights that stay positive in training: g = exp(theta), the parameter is theta.

        register_parametrization(linear, "weight", Conductance())

    exp, since dL/dtheta = g dL/dg: a step of Adam changes a conductance by about the learning rate
    times itself, whether it is large or small. None comes to 0.

    Raises:
        ValueError: in register_parametrization, or where a weight is assigned: one is not positive.
    """

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        """The conductances."""
        return theta.exp()

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """theta of positive weights."""
        if not (weight.is_meta or isinstance(weight, FakeTensor)) and not bool((weight > 0).all()):
            raise ValueError(f"Expected positive conductances, got {weight.min().item()}")
        return weight.log()


class ShuntingLayer(nn.Module):
    """A layer of neurons with excitation, shunting inhibition and branches, all conductances.

        E = sum g x_e,  I = sum h x_i                dendrites
        V_r = phi(E_r / (1 + E_r + I_r))
        y_s = phi(sum_j c_j V_j / (1 + sum_j c_j))   somas; j: the dendrites of s

    The leak is 1, and for inputs >= 0 a potential is from 0 to less than 1. Negative inputs may
    make a denominator 0: they are not looked for, which would wait for a GPU in each step.

    Modules:
        excitation, inhibition, cable: each a SparseLinear without a bias, whose `weight` are
        conductances (read it, or assign positive ones): [nnz] of each Connectivity, and c [R].

    Parameters:
        theta, the logarithms of these: excitation.parametrizations.weight.original [nnz] and so on.
        They start so that, for independent inputs of mean `input_mean`, E is 2 and I is 1 on
        average: V is close to 1/2, where a relative change of E moves it most. Within a dendrite
        theta is uniform, +-1. Cables start at 1, as the leak.

    Args:
        excitation: N inputs, R dendrites, S somas.
        inhibition: inputs and R dendrites (its somas play no part).
        input_mean: of inputs at first, for the scale of conductances.
        activation: phi, "identity" or "tanh".
        device, dtype: of the parameters; with float16 and bfloat16 sums are float32.

    Raises:
        TypeError, ValueError: an argument or an input does not fit.

    Source: docs/neurons.md.
    """

    def __init__(
        self,
        excitation: Connectivity,
        inhibition: Connectivity,
        *,
        input_mean: float = 0.5,
        activation: Literal["identity", "tanh"] = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def linear(c: Connectivity) -> SparseLinear:
            made = SparseLinear(c, bias=False, device=device, dtype=dtype)
            nn.init.ones_(made.weight)
            register_parametrization(made, "weight", Conductance())
            return made

        self.excitation, self.inhibition = linear(excitation), linear(inhibition)
        rows = excitation.num_dendrites
        if inhibition.num_dendrites != rows:
            raise ValueError(
                f"Expected inhibition of {rows} dendrites, as excitation has, "
                f"got {inhibition.num_dendrites}"
            )
        if not 0 < input_mean < math.inf:
            raise ValueError(f"Expected a finite input_mean > 0, got {input_mean}")
        if activation not in ("identity", "tanh"):
            raise ValueError(f"Expected an activation of identity and tanh, got {activation!r}")
        self.input_mean, self.activation = input_mean, activation
        with unset_fake_temporarily():  # FakeTensorMode takes no index tensor apart
            branches = connectivity.chain(excitation.soma_ptr)
        self.cable = linear(branches)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        for linear, mean in ((self.excitation, _EXCITATION), (self.inhibition, _INHIBITION)):
            theta = _theta(linear)
            counts = operators.beside(theta, linear.connectivity.crow_indices).long().diff()
            each = mean / (self.input_mean * counts.double())  # g on average
            centre = (each / math.sinh(1)).log()  # sinh(1): the mean of exp of uniform +-1
            if not theta.is_meta:
                theta.uniform_(-1, 1).add_(
                    centre.repeat_interleave(counts, output_size=theta.numel()).to(theta)
                )
        _theta(self.cable).zero_()

    def forward(self, x: torch.Tensor, inhibition: torch.Tensor | None = None) -> torch.Tensor:
        """[..., N] -> [..., S]; `inhibition`: the inputs x_i, None: they are x too."""
        e = self.excitation(x)  # [..., R]
        i = self.inhibition(x if inhibition is None else inhibition)
        v = self._phi(e / (1 + e + i))
        total = self.cable(v.new_ones(v.shape[-1]))  # [S]
        return self._phi(self.cable(v) / (1 + total))

    def _phi(self, v: torch.Tensor) -> torch.Tensor:
        return v.tanh() if self.activation == "tanh" else v

    def extra_repr(self) -> str:
        return f"input_mean={self.input_mean:g}, activation={self.activation}"


def _theta(linear: SparseLinear) -> nn.Parameter:
    return linear.get_parameter("parametrizations.weight.original")


def build(
    inputs: int,
    somas: int,
    dendrites: int,
    excitatory: int,
    inhibitory: int,
    classes: int,
    *,
    input_mean: float = 0.5,
    seed: int | np.random.Generator | None = None,
) -> nn.Sequential:
    """A network: a ShuntingLayer on random synapses, and a dense output layer of any sign.

    Args:
        inputs: N, which must not be negative; each may excite some dendrites and inhibit others.
        somas, dendrites: S, and D per soma.
        excitatory, inhibitory: synapses of each dendrite.
        classes: number of outputs.
        input_mean: see ShuntingLayer.
        seed: of the connectivity. Parameters come from torch's generator.

    Returns:
        nn.Sequential that maps [..., N] to logits [..., classes].

    Raises:
        TypeError, ValueError: sizes that do not fit.
    """
    check_size("classes", classes)
    rng = np.random.default_rng(seed)
    drawn = [
        connectivity.random(inputs, somas, dendrites, count, constant_fan_in=True, seed=rng)
        for count in (excitatory, inhibitory)
    ]
    layer = ShuntingLayer(drawn[0], drawn[1], input_mean=input_mean)
    return nn.Sequential(layer, nn.Linear(somas, classes))
