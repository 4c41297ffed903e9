"""The workloads of the GPU figures, and other ways to compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer


@dataclass(frozen=True)
class Case:
    batch: int
    inputs: int
    somas: int
    dendrites: int
    synapses: int

    @property
    def macs(self) -> int:
        """Multiply-adds of the synapses in forward."""
        return self.batch * self.somas * self.dendrites * self.synapses

    def layer(self) -> dk.DendriticLayer:
        c = dk.connectivity.random(
            self.inputs, self.somas, self.dendrites, self.synapses, constant_fan_in=True, seed=0
        )
        return dk.DendriticLayer(c, device="cuda")


CASES = {
    "A": Case(128, 784, 256, 16, 16),
    "B": Case(128, 784, 512, 64, 16),
    "C": Case(128, 3072, 512, 32, 48),
    "D": Case(1024, 4096, 4096, 16, 32),
    "G": Case(512, 65536, 65536, 16, 32),
}
Step = Callable[[], object]


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, grad: Tensor
) -> Step:
    """Forward, backward, masks of the gradients where there are any, and the optimizer."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).backward(grad)
        for module in model.modules():
            if isinstance(module, MaskedDendriticLayer):
                module.mask_gradients()
        optimizer.step()

    return run


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)


class BlockSum(nn.Module):
    """u [R, B] from x^T [N, B] by `synapses`, then bias, cable and soma block by block."""

    def __init__(self, layer: dk.DendriticLayer) -> None:
        super().__init__()
        self.source, self.slope = copy.deepcopy(layer), layer.negative_slope
        c = layer.connectivity
        self.blocks = (c.num_somas, c.num_dendrites // c.num_somas)
        self.columns = c.col_indices.long().cuda()
        self.crow = c.crow_indices.long().cuda()
        self.shape = (c.num_dendrites, c.in_features)

    def synapses(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        layer = self.source
        assert layer.dendrite_bias is not None
        assert layer.soma_bias is not None
        u = self.synapses(x.t().contiguous()) + layer.dendrite_bias[:, None]
        a = F.leaky_relu(u, self.slope).unflatten(0, self.blocks)  # [S, D, B]
        v = (a * layer.cable_weight.view(self.blocks)[:, :, None]).sum(1)
        return F.leaky_relu(v + layer.soma_bias[:, None], self.slope).t()


class Csr(BlockSum):
    def synapses(self, features: Tensor) -> Tensor:
        weight = torch.sparse_csr_tensor(
            self.crow, self.columns, self.source.synapse_weight, self.shape
        )
        return weight @ features


class EmbeddingBag(BlockSum):
    def synapses(self, features: Tensor) -> Tensor:
        return F.embedding_bag(
            self.columns, features, self.crow, mode="sum",
            per_sample_weights=self.source.synapse_weight, include_last_offset=True,
        )  # fmt: skip


class Gather(BlockSum):
    def synapses(self, features: Tensor) -> Tensor:
        weight = self.source.synapse_weight.view(self.shape[0], -1, 1)
        return (features[self.columns.view(self.shape[0], -1)] * weight).sum(1)


# The most important ones are timed first, since time may run out.
DENSE = ("masked dense fp32", "masked dense tf32", "masked dense bf16")
OTHERS = ("torch csr", "embedding_bag", "gather, compiled")


def peers(layer: dk.DendriticLayer) -> dict[str, Callable[[], nn.Module]]:
    """Functions that make modules equal to `layer`; each may run out of memory."""

    def dense() -> nn.Module:
        return MaskedDendriticLayer.from_layer(layer)

    def gather() -> nn.Module:
        compiled: nn.Module = torch.compile(Gather(layer), dynamic=False)  # type: ignore[assignment]
        return compiled

    return {
        "masked dense fp32": dense,
        "masked dense tf32": dense,
        "masked dense bf16": dense,
        "torch csr": lambda: Csr(layer),
        "embedding_bag": lambda: EmbeddingBag(layer),
        "gather, compiled": gather,
    }
