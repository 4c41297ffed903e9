"""What a user could pick instead, and the package's backends: one small class for each.

All compute the same layer of a `Problem`. A peer's parameters have the layout that suits it best
(a matrix, padded rows); `results` hands its gradients back synapse by synapse for verification.
"""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.masked_dense import MaskedDendriticLayer
from bench.speed.problem import PARAMETERS, Problem

MODES = ("forward", "training", "training with dx")
OURS, OFFICIAL = "dendrite_kernels cpp", "masked dense, official"
_MEMORY_SHARE = 0.7  # of what the machine has available


class Peer:
    """Forward without gradients, and forward + backward with and without the input's gradient."""

    modes: tuple[str, ...] = MODES

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x = problem.x.clone().requires_grad_()
        self.leaves = self.make_leaves()

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        """What building and running it takes beyond the problem, roughly."""
        c = problem.connectivity
        return 16 * (c.nnz + c.num_dendrites * len(problem.x))

    def make_leaves(self) -> dict[str, Tensor]:
        return {name: p.clone().requires_grad_() for name, p in self.problem.parameters.items()}

    def layer(self, x: Tensor) -> Tensor:
        """x [B, N] -> y [B, S]."""
        raise NotImplementedError

    def surroundings(self) -> AbstractContextManager[object]:
        """What every call runs in, entered before the clock starts."""
        return nullcontext()

    def run(self, mode: str) -> Tensor:
        if mode == "forward":
            with torch.no_grad():
                return self.layer(self.problem.x)
        x = self.x if mode == "training with dx" else self.problem.x
        x.grad = None
        for leaf in self.leaves.values():
            leaf.grad = None
        y = self.layer(x)
        y.backward(self.problem.grad)
        return y

    def results(self, mode: str) -> dict[str, Tensor | None]:
        """y and, by the names of x and the parameters, the gradients `mode` computes."""
        y = self.run(mode)
        if mode == "forward":
            return {"y": y}
        results = {"y": y, **self.gradients()}
        return {**results, "x": self.x.grad} if mode == "training with dx" else results

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: self.leaves[name].grad for name in PARAMETERS}


class _Package(Peer):
    """The package itself, through its public function."""

    backend: str

    def surroundings(self) -> AbstractContextManager[object]:
        return dk.use_backend(self.backend)

    def layer(self, x: Tensor) -> Tensor:
        p, parameters = self.problem, cast(Any, self.leaves)
        return dk.functional.dendritic_layer(
            x, connectivity=p.connectivity, negative_slope=p.negative_slope, **parameters
        )


class Cpp(_Package):
    backend = "cpp"


class Numba(_Package):
    backend = "numba"


class MaskedDense(Peer):
    """Two dense matrices; the gradients are multiplied by masks of the weights' dtype."""

    mask_dtype = torch.float32

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
        weight, cable = _grad(dendrite.weight), _grad(soma.weight)
        if weight.count_nonzero() > p.connectivity.nnz or cable.count_nonzero() > len(cable[0]):
            raise ArithmeticError("gradients outside the masks")
        return {
            "synapse_weight": weight[p.row_of_synapse, p.connectivity.col_indices.long()],
            "cable_weight": cable[p.soma_of_dendrite, torch.arange(len(weight))],
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
        self.mask = dense.dendrite_mask.to(torch.float32)
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
            _grad(self.leaves["synapse_weight"]).mul_(self.mask)
        return y

    def gradients(self) -> dict[str, Tensor | None]:
        p, weight = self.problem, _grad(self.leaves["synapse_weight"])
        synapses = weight[p.row_of_synapse, p.connectivity.col_indices.long()]
        return {**super().gradients(), "synapse_weight": synapses}


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


class _Compiled(_BatchLast):
    """All but the transposition, which the compiler would fuse into every read of an input."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = torch.compile(self.from_features, dynamic=False, fullgraph=True)

    def layer(self, x: Tensor) -> Tensor:
        return self.compiled(x.t().contiguous())


class TorchCsr(_BatchLast):
    """torch.sparse by hand: a product, a sampled product for dw, the known transpose for dx."""

    def make_leaves(self) -> dict[str, Tensor]:
        c = self.problem.connectivity
        self.shape = c.num_dendrites, c.in_features
        self.order = torch.argsort(c.col_indices, stable=True)  # CSR position of each of W^T's
        counts = torch.bincount(c.col_indices, minlength=c.in_features)
        self.transposed_crow = F.pad(counts.cumsum(0), (1, 0)).int()
        self.transposed_col = self.problem.row_of_synapse[self.order].int()
        with warnings.catch_warnings():  # once in a process: that sparse tensors are "in beta"
            warnings.simplefilter("ignore")
            self.pattern = self.matrix(torch.zeros(c.nnz))
        return super().make_leaves()

    def matrix(self, values: Tensor) -> Tensor:
        c = self.problem.connectivity
        return torch.sparse_csr_tensor(
            c.crow_indices, c.col_indices, values, self.shape, check_invariants=False
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
        c = self.problem.connectivity
        self.offsets, self.columns = c.crow_indices.long(), c.col_indices.long()
        return super().make_leaves()

    def synapses(self, features: Tensor) -> Tensor:
        return F.embedding_bag(
            self.columns, features, self.offsets, mode="sum",
            per_sample_weights=self.leaves["synapse_weight"], include_last_offset=True,
        )  # fmt: skip


class CompiledEmbeddingBag(_Compiled, EmbeddingBag):
    pass


class CompiledGather(_Compiled):
    """Rows of x^T by plain indexing, weighed and added, fused by torch.compile.

    Short rows are padded with a feature that is always 0.
    """

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        c = problem.connectivity
        widest = int(c.crow_indices.diff().max())
        return 12 * c.num_dendrites * widest * len(problem.x)  # where the compiler fuses nothing

    def make_leaves(self) -> dict[str, Tensor]:
        c, row = self.problem.connectivity, self.problem.row_of_synapse
        counts = c.crow_indices.long().diff()
        self.padded = c.fan_in is None
        self.place = row, torch.arange(c.nnz) - c.crow_indices.long()[row]
        widest = int(counts.max())
        self.columns = torch.full((c.num_dendrites, widest), c.in_features)
        self.columns[self.place] = c.col_indices.long()
        weight = torch.zeros(c.num_dendrites, widest)
        weight[self.place] = self.problem.synapse_weight
        return {**super().make_leaves(), "synapse_weight": weight.requires_grad_()}

    def synapses(self, features: Tensor) -> Tensor:
        padded = F.pad(features, (0, 0, 0, 1)) if self.padded else features
        return (padded[self.columns] * self.leaves["synapse_weight"][:, :, None]).sum(1)

    def gradients(self) -> dict[str, Tensor | None]:
        synapses = _grad(self.leaves["synapse_weight"])[self.place]
        return {**super().gradients(), "synapse_weight": synapses}


class ScipyCsr(Peer):
    """scipy and NumPy, one thread, forward only."""

    modes = ("forward",)

    def make_leaves(self) -> dict[str, Tensor]:
        c = self.problem.connectivity
        arrays = (t.numpy() for t in (self.problem.synapse_weight, c.col_indices, c.crow_indices))
        self.matrix = scipy.sparse.csr_array(tuple(arrays), (c.num_dendrites, c.in_features))
        self.arrays = {name: p.numpy() for name, p in self.problem.parameters.items()}
        return {}

    def layer(self, x: Tensor) -> Tensor:
        p, slope = self.arrays, np.float32(self.problem.negative_slope)
        u = self.matrix @ np.ascontiguousarray(x.numpy().T) + p["dendrite_bias"][:, None]  # [R, B]
        a = np.where(u > 0, u, slope * u).reshape(len(p["soma_bias"]), -1, len(x))
        cable = p["cable_weight"].reshape(a.shape[0], 1, a.shape[1])
        v = np.matmul(cable, a)[:, 0].T + p["soma_bias"]  # [B, S]
        return torch.from_numpy(np.where(v > 0, v, slope * v))


PEERS: dict[str, type[Peer]] = {
    OURS: Cpp,
    "dendrite_kernels numba": Numba,
    OFFICIAL: OfficialMaskedDense,
    "masked dense, float masks": MaskedDense,
    "masked dense + block-sum cable": BlockSumCable,
    "torch CSR by hand": TorchCsr,
    "embedding_bag": EmbeddingBag,
    "embedding_bag, compiled": CompiledEmbeddingBag,
    "gather, compiled": CompiledGather,
    "scipy CSR": ScipyCsr,
}
PACKAGE = (OURS, "dendrite_kernels numba")


def reason_to_skip(name: str, problem: Problem) -> str | None:
    """Why this machine cannot run the peer, or None."""
    peer = PEERS[name]
    if issubclass(peer, _Package):
        entry = dk.backend_info()[peer.backend]
        return None if entry["available"] else str(entry["reason"])
    if issubclass(peer, _Compiled) and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler"
    needed, available = peer.bytes_needed(problem), available_bytes()
    if available is not None and needed > _MEMORY_SHARE * available:
        return f"needs about {needed / 2**30:.1f} of {available / 2**30:.1f} GiB"
    return None


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable:")), None)


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ArithmeticError("no gradient")
    return leaf.grad
