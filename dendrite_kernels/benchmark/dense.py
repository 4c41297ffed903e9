"""Dense matrices under masks: what most people train such layers with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .masked_dense import MaskedDendriticLayer
from .peer import Peer, gradient_of
from .problem import Problem


class MaskedDense(Peer):
    """Two dense matrices; the gradients are multiplied by masks of the weights' dtype."""

    mask_dtype: torch.dtype | None = None  # the weights' own

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        c = problem.connectivity
        entries = c.num_dendrites * (c.in_features + c.num_somas)
        return 24 * entries + 16 * c.num_dendrites * len(problem.x)

    def make_leaves(self) -> dict[str, Tensor]:
        dense = self.problem.dense
        self.module = MaskedDendriticLayer(*dense, self.problem.negative_slope, self.mask_dtype)
        return dict(self.module.named_parameters())

    def layer(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def run(self, mode: str) -> Tensor:
        y = super().run(mode)
        if mode != "forward":
            self.module.mask_gradients()
        return y

    def gradients(self) -> dict[str, Tensor | None]:
        p, dendrite, soma = self.problem, self.module.dendrite, self.module.soma
        weight, cable = gradient_of(dendrite.weight), gradient_of(soma.weight)
        if weight.count_nonzero() > p.connectivity.nnz or cable.count_nonzero() > len(cable[0]):
            raise ArithmeticError("gradients outside the masks")
        dendrites = torch.arange(len(weight), device=weight.device)
        return {
            "synapse_weight": weight[p.row_of_synapse, p.columns],
            "cable_weight": cable[p.soma_of_dendrite, dendrites],
            "dendrite_bias": dendrite.bias.grad,
            "soma_bias": soma.bias.grad,
        }


class OfficialMaskedDense(MaskedDense):
    """As the official code: the masks of the gradients are int64."""

    mask_dtype = torch.int64

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        return MaskedDense.bytes_needed(problem) * 3 // 2


class BlockSumCable(Peer):
    """A masked dense matrix to the dendrites, but their sums at the somas block by block."""

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        c = problem.connectivity
        return 16 * c.num_dendrites * (c.in_features + len(problem.x))

    def make_leaves(self) -> dict[str, Tensor]:
        dense = self.problem.dense
        self.mask = dense.dendrite_mask.to(self.problem.x.dtype)
        return {**super().make_leaves(), "synapse_weight": dense.dendrite.weight}

    def layer(self, x: Tensor) -> Tensor:
        leaves, slope = self.leaves, self.problem.negative_slope
        a = F.linear(x, leaves["synapse_weight"], leaves["dendrite_bias"])
        a = F.leaky_relu(a, slope).unflatten(1, (self.problem.connectivity.num_somas, -1))
        v = torch.einsum("bsd,sd->bs", a, leaves["cable_weight"].view(a.shape[1:]))
        return F.leaky_relu(v + leaves["soma_bias"], slope)

    def run(self, mode: str) -> Tensor:
        y = super().run(mode)
        if mode != "forward":
            gradient_of(self.leaves["synapse_weight"]).mul_(self.mask)
        return y

    def gradients(self) -> dict[str, Tensor | None]:
        p, weight = self.problem, gradient_of(self.leaves["synapse_weight"])
        synapses = weight[p.row_of_synapse, p.columns]
        return {**super().gradients(), "synapse_weight": synapses}
