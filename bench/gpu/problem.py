"""The workloads of the GPU figures, other ways to compute them, and what is right in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.speed import cases
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer
from dendrite_kernels.benchmark.oracle import PARAMETERS
from dendrite_kernels.benchmark.peer import gradient_of
from tests import oracle

CASES = {
    **{name: cases.CASES[name] for name in "ABC"},
    "D": Case("D", 1024, 64, 64, 1, 4096, 16, 32),
    "G": Case("G", 512, 256, 256, 1, 65536, 16, 32),  # first layer: x needs no gradient
}
ORACLE_BYTES = 1 << 30  # of one array of the oracle
Step = Callable[[], object]
Maker = Callable[[dk.DendriticLayer], nn.Module]


def prepare(case: Case, kind: str = "constant") -> tuple[dk.DendriticLayer, Tensor, Tensor]:
    """A layer, x [B, N], and the gradient of y [B, S]."""
    torch.manual_seed(0)
    layer = dk.DendriticLayer(case.connectivity(kind), device="cuda")
    x = torch.randn(case.batch, case.in_features, device="cuda")
    return layer, x, torch.randn(case.batch, case.somas, device="cuda")


class DenseBlockSum(nn.Module):
    """A masked dense matrix to the dendrites, but their sums at the somas block by block."""

    mask: Tensor

    def __init__(self, layer: dk.DendriticLayer) -> None:
        super().__init__()
        self.dendrite, mask = dk.interop.to_masked_dense(layer)[:2]
        self.register_buffer("mask", mask.to(self.dendrite.weight.dtype))
        self.slope, self.blocks = layer.negative_slope, (layer.connectivity.num_somas, -1)
        self.cable = nn.Parameter(layer.cable_weight.detach().clone().view(self.blocks))
        assert layer.soma_bias is not None
        self.soma_bias = nn.Parameter(layer.soma_bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.dendrite(x), self.slope).unflatten(1, self.blocks)  # [B, S, D]
        v = torch.einsum("bsd,sd->bs", a, self.cable)
        return F.leaky_relu(v + self.soma_bias, self.slope)

    def mask_gradients(self) -> None:
        gradient_of(self.dendrite.weight).mul_(self.mask)


class BlockSum(nn.Module):
    """u [R, B] from x^T [N, B] by `synapses`, then bias, cable and soma block by block."""

    def __init__(self, layer: dk.DendriticLayer) -> None:
        super().__init__()
        self.source, self.slope = copy.deepcopy(layer), layer.negative_slope
        c = layer.connectivity
        self.blocks = (c.num_somas, c.num_dendrites // c.num_somas)
        self.columns = c.col_indices.long().to("cuda")
        self.crow = c.crow_indices.long().to("cuda")
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


def compiled_gather(layer: dk.DendriticLayer) -> nn.Module:
    """Compiled, or its call is an error: `fullgraph` has no part run eagerly."""
    torch._dynamo.reset()  # the modules before count towards the limit of recompilations
    compiled: nn.Module
    compiled = torch.compile(Gather(layer), dynamic=False, fullgraph=True)  # type: ignore[assignment]
    return compiled


# Modules equal to a layer, by name and precision. Masks of floats: int64 ones, which the official
# code has, take longer. In "bf16" products run under autocast; in "bf16 weights" all is bf16.
PRECISIONS = ("fp32", "tf32", "bf16", "bf16 weights")
OURS: dict[str, Maker] = {f"ours, {precision}": copy.deepcopy for precision in ("fp32", "bf16")}
_MATRICES: dict[str, Maker] = {
    "masked dense": MaskedDendriticLayer.from_layer,
    "dense, block-sum cable": DenseBlockSum,
}
DENSE: dict[str, Maker] = {
    f"{name}, {precision}": make for precision in PRECISIONS for name, make in _MATRICES.items()
}
OTHERS: dict[str, Maker] = {
    "embedding_bag, fp32": EmbeddingBag,
    "compiled gather, fp32": compiled_gather,
}
# Last, since what follows a capture that fails may fail, too.
CSR: dict[str, Maker] = {"torch csr, fp32": Csr}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, grad: Tensor
) -> Step:
    """Forward, backward, masks of the gradients where there are any, and the optimizer."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).backward(grad)
        if isinstance(model, MaskedDendriticLayer | DenseBlockSum):
            model.mask_gradients()
        optimizer.step()

    return run


def wanted(layer: dk.DendriticLayer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """float64 y and gradients of x and the parameters, on the device, by parts of the batch."""
    c = layer.connectivity
    parameters = [getattr(layer, name).detach().double().requires_grad_() for name in PARAMETERS]
    weight, dendrite_bias, cable, soma_bias = parameters
    chunk = max(1, ORACLE_BYTES // (8 * c.nnz))
    ys, dxs = [], []
    sums = [torch.zeros_like(p) for p in parameters]
    for some, grad_y in zip(x.split(chunk), grad.split(chunk), strict=True):
        leaf = some.double().requires_grad_()
        y = oracle.dendritic_layer(
            leaf, weight, dendrite_bias, cable, soma_bias, c, layer.negative_slope
        )
        dx, *found = torch.autograd.grad(y, [leaf, *parameters], grad_y.double())
        ys.append(y.detach())
        dxs.append(dx)
        for total, part in zip(sums, found, strict=True):
            total += part
    return {"y": torch.cat(ys), "x": torch.cat(dxs), **dict(zip(PARAMETERS, sums, strict=True))}


def gradients(model: nn.Module, c: dk.Connectivity) -> dict[str, Tensor]:
    """Those of the parameters of our layer, from the module of any peer."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    layer = model.source if isinstance(model, BlockSum) else model
    if isinstance(layer, dk.DendriticLayer):
        return {name: getattr(layer, name).grad for name in PARAMETERS}
    assert isinstance(layer, MaskedDendriticLayer | DenseBlockSum)
    rows = torch.arange(c.num_dendrites, device="cuda")
    row = rows.repeat_interleave(c.crow_indices.to("cuda").long().diff())
    cable, soma_bias = (
        (layer.cable, layer.soma_bias)
        if isinstance(layer, DenseBlockSum)
        else (layer.soma.weight, layer.soma.bias)
    )
    weight, dendrite_bias, cables, of_somas = (
        gradient_of(p) for p in (layer.dendrite.weight, layer.dendrite.bias, cable, soma_bias)
    )
    if isinstance(layer, MaskedDendriticLayer):
        cables = cables[rows // (c.num_dendrites // c.num_somas), rows]
    synapses = weight[row, c.col_indices.long().to("cuda")]
    found = synapses, dendrite_bias, cables.flatten(), of_somas
    return dict(zip(PARAMETERS, found, strict=True))
