"""Sparse ways that torch and scipy offer: products of CSR matrices, embedding bags, gathers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .peer import Peer, gradient_of
from .problem import Problem


class _BatchLast(Peer):
    """Peers that compute on x^T, so that dendrites are [R, B]."""

    def layer(self, x: Tensor) -> Tensor:
        return self.from_features(x.t().contiguous())

    def from_features(self, features: Tensor) -> Tensor:
        """features [N, B] -> y [B, S]."""
        leaves, slope = self.leaves, self.problem.negative_slope
        a = F.leaky_relu(self.synapses(features) + leaves["dendrite_bias"][:, None], slope)
        a = a.unflatten(0, (self.problem.connectivity.num_somas, -1))  # [S, D, B]
        cable = leaves["cable_weight"].view(a.shape[:2])[:, :, None]
        # not einsum: the compiler makes twice as slow code of it
        return F.leaky_relu((a * cable).sum(1) + leaves["soma_bias"][:, None], slope).t()

    def synapses(self, features: Tensor) -> Tensor:
        """features [N, B] -> W features [R, B]."""
        raise NotImplementedError


class Compiled(_BatchLast):
    """All but the transposition, which the compiler would fuse into every read of an input."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = torch.compile(self.from_features, dynamic=False, fullgraph=True)

    def layer(self, x: Tensor) -> Tensor:
        return self.compiled(x.t().contiguous())


class TorchCsr(_BatchLast):
    """torch.sparse by hand: a product, a sampled product for dw, the known transpose for dx."""

    def make_leaves(self) -> dict[str, Tensor]:
        p, c = self.problem, self.problem.connectivity
        self.shape = c.num_dendrites, c.in_features
        self.crow, self.columns = p.crow.int(), p.columns.int()
        self.order = torch.argsort(p.columns, stable=True)  # CSR position of each of W^T's
        counts = torch.bincount(p.columns, minlength=c.in_features)
        self.transposed_crow = F.pad(counts.cumsum(0), (1, 0)).int()
        self.transposed_col = p.row_of_synapse[self.order].int()
        with warnings.catch_warnings():  # once in a process: that sparse tensors are "in beta"
            warnings.simplefilter("ignore")
            self.pattern = self.matrix(torch.zeros_like(p.synapse_weight))
        return super().make_leaves()

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.crow, self.columns, values, self.shape, check_invariants=False
        )

    def transposed_matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.transposed_crow, self.transposed_col, values[self.order], self.shape[::-1],
            check_invariants=False,
        )  # fmt: skip

    def layer(self, x: Tensor) -> Tensor:
        return self.from_features(x.t())  # the product takes it as it lies

    def synapses(self, features: Tensor) -> Tensor:
        u: Tensor = _CsrProduct.apply(features, self.leaves["synapse_weight"], self)
        return u


class _CsrProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, peer: TorchCsr) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.peer = peer
        return peer.matrix(weight) @ features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [R, B]
        features, weight = ctx.saved_tensors
        dw = torch.sparse.sampled_addmm(ctx.peer.pattern, grad, features.t()).values()
        dx = ctx.peer.transposed_matrix(weight) @ grad if ctx.needs_input_grad[0] else None
        return dx, dw, None


class EmbeddingBag(_BatchLast):
    """Inputs as the rows of an embedding: F.embedding_bag weighs and adds them."""

    def make_leaves(self) -> dict[str, Tensor]:
        self.offsets, self.columns = self.problem.crow, self.problem.columns
        return super().make_leaves()

    def synapses(self, features: Tensor) -> Tensor:
        return F.embedding_bag(
            self.columns, features, self.offsets, mode="sum",
            per_sample_weights=self.leaves["synapse_weight"], include_last_offset=True,
        )  # fmt: skip


class CompiledEmbeddingBag(Compiled, EmbeddingBag):
    pass


class CompiledGather(Compiled):
    """Rows of x^T by plain indexing, weighed and added, fused by torch.compile.

    Short rows are padded with a feature that is always 0.
    """

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        c = problem.connectivity
        widest = int(c.crow_indices.diff().max())
        return 12 * c.num_dendrites * widest * len(problem.x)  # where the compiler fuses nothing

    def make_leaves(self) -> dict[str, Tensor]:
        p, c = self.problem, self.problem.connectivity
        row, counts = p.row_of_synapse, p.crow.diff()
        self.padded = c.fan_in is None
        self.place = row, torch.arange(c.nnz, device=row.device) - p.crow[row]
        widest = int(counts.max())
        self.columns = row.new_full((c.num_dendrites, widest), c.in_features)
        self.columns[self.place] = p.columns
        weight = p.synapse_weight.new_zeros(c.num_dendrites, widest)
        weight[self.place] = p.synapse_weight
        return {**super().make_leaves(), "synapse_weight": weight.requires_grad_()}

    def synapses(self, features: Tensor) -> Tensor:
        padded = F.pad(features, (0, 0, 0, 1)) if self.padded else features
        return (padded[self.columns] * self.leaves["synapse_weight"][:, :, None]).sum(1)

    def gradients(self) -> dict[str, Tensor | None]:
        synapses = gradient_of(self.leaves["synapse_weight"])[self.place]
        return {**super().gradients(), "synapse_weight": synapses}


class ScipyCsr(Peer):
    """scipy and NumPy, one thread, forward only."""

    modes = ("forward",)
    device = "cpu"

    def make_leaves(self) -> dict[str, Tensor]:
        self.matrix = self.problem.connectivity.to_scipy(self.problem.synapse_weight)
        self.arrays = {name: p.numpy() for name, p in self.problem.parameters.items()}
        return {}

    def layer(self, x: Tensor) -> Tensor:
        p, slope = self.arrays, self.problem.x.numpy().dtype.type(self.problem.negative_slope)
        u = self.matrix @ np.ascontiguousarray(x.numpy().T) + p["dendrite_bias"][:, None]  # [R, B]
        a = np.where(u > 0, u, slope * u).reshape(len(p["soma_bias"]), -1, len(x))
        cable = p["cable_weight"].reshape(a.shape[0], 1, a.shape[1])
        v = np.matmul(cable, a)[:, 0].T + p["soma_bias"]  # [B, S]
        return torch.from_numpy(np.where(v > 0, v, slope * v))
