"""One layer on many devices: each rank of a mesh stores and computes some of the somas.

    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(model, mesh, {"0": ShardSomas(), "1": ShardSomas()})

Somas are independent given the input, so forward needs no communication but that of its output
(gathered, or kept sharded) and backward one all-reduce of the gradient of x, where x needs one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from . import functional
from .nn import DendriticLayer
from .structure import Connectivity


class ShardSomas(ParallelStyle):
    """Shard a DendriticLayer by somas, as torch.chunk would: the last rank may have fewer.

    Parameters become DTensors. Where all ranks hold equally much (constant fan-in, constant
    dendrites per soma, S divisible), a checkpoint of them resumes on any number of ranks;
    elsewhere each shard ends in zeros that pad it to the largest, and a checkpoint fits this
    number of ranks: go through `gather` to change it.

    Args:
        input_layouts: of x where it is not a DTensor; Replicate() by default.
        output_layouts: Replicate() (gathered, the default) or Shard(-1) (each rank its somas).
        use_local_output: return a torch.Tensor, not a DTensor.

    Raises:
        TypeError: the module is not a DendriticLayer.
        ValueError: the mesh has several dimensions, a rank would get no soma, or ranks disagree
            on the connectivity (draw it with a seed, or on one rank and broadcast it).
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DendriticLayer):
            raise TypeError(f"Expected a DendriticLayer, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"Expected a mesh of one dimension, got {device_mesh.ndim}")
        whole = module.connectivity
        _check_agreement(whole, device_mesh)
        parts = _parts(whole, device_mesh.size())
        values = {
            name: nn.Parameter(
                _shard(parameter, [part[kind] for part in parts], device_mesh, self.src_data_rank),
                requires_grad=parameter.requires_grad,
            )
            for name, kind in _COUNTED_BY.items()
            if (parameter := getattr(module, name)) is not None
        }
        for name, value in values.items():
            module.register_parameter(name, value)
        module.__class__ = ShardedDendriticLayer
        sharded: Any = module
        sharded.connectivity = _part_of(whole, parts[device_mesh.get_local_rank()])
        sharded.whole, sharded.mesh, sharded.style = whole, device_mesh, self
        return module


class ShardedDendriticLayer(DendriticLayer):
    """What ShardSomas makes of a DendriticLayer; `connectivity` is this rank's part of `whole`."""

    whole: Connectivity
    mesh: DeviceMesh
    style: ShardSomas

    def described(self) -> Connectivity:
        return self.whole

    def _local(self, name: str) -> torch.Tensor | None:
        """This rank's values of a parameter, without pads."""
        parameter = getattr(self, name)
        if parameter is None:
            return None
        c = self.connectivity
        count = {"synapse": c.nnz, "dendrite": c.num_dendrites, "soma": c.num_somas}
        values: torch.Tensor = parameter.to_local()
        return values[: count[_COUNTED_BY[name]]]

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's somas of x [..., N], gathered or sharded as the style asks; no gate."""
        if gate is not None:
            raise RuntimeError("Expected no gate in a sharded layer, got one")
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [self.style.input_layouts], run_check=False)
        # Each rank's gradient of x counts its own somas only: their sum is the gradient.
        x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        weight, cable = self._local("synapse_weight"), self._local("cable_weight")
        assert weight is not None
        assert cable is not None
        local = functional.dendritic_layer(
            x,
            weight,
            self._local("dendrite_bias"),
            cable,
            self._local("soma_bias"),
            self.connectivity,
            activation=self.activation,
            negative_slope=self.negative_slope,
            soma_activation=self.soma_activation,
        )
        shape = torch.Size((*local.shape[:-1], self.whole.num_somas))
        stride = torch.empty(shape, device="meta").stride()
        somas = Shard(local.dim() - 1)
        y = DTensor.from_local(
            local, self.mesh, [somas], run_check=False, shape=shape, stride=stride
        )
        wanted = self.style.output_layouts
        y = y.redistribute(placements=[somas if wanted.is_shard() else wanted])
        return y.to_local() if self.style.use_local_output else y

    def dendrites(self, x: torch.Tensor) -> torch.Tensor:
        """RuntimeError: no rank has all dendrites."""
        raise RuntimeError("Expected a layer that is whole, got a sharded one: see parallel.gather")

    def reset_parameters(self) -> None:
        """RuntimeError: the ranks would draw other numbers than a whole layer."""
        raise RuntimeError("Expected a layer that is whole, got a sharded one: reset, then shard")


@torch.no_grad()
def gather(layer: nn.Module) -> DendriticLayer:
    """The whole layer behind a sharded one, on every rank. All ranks must call it."""
    if not isinstance(layer, ShardedDendriticLayer):
        raise TypeError(f"Expected a sharded DendriticLayer, got {type(layer).__name__}")
    whole, weight = layer.whole, layer.synapse_weight
    result = DendriticLayer(
        whole,
        bias=layer.dendrite_bias is not None,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        soma_activation=layer.soma_activation,
        init=layer.init,
        device=weight.device,
        dtype=weight.dtype,
    )
    parts = _parts(whole, layer.mesh.size())
    for name, kind in _COUNTED_BY.items():
        parameter: Any = getattr(layer, name)
        if parameter is None:
            continue
        chunks = parameter.full_tensor().chunk(len(parts))
        kept = [
            chunk[: part[kind].stop - part[kind].start]
            for chunk, part in zip(chunks, parts, strict=True)
        ]
        getattr(result, name).copy_(torch.cat(kept)).requires_grad_(parameter.requires_grad)
    return result


_COUNTED_BY = {
    "synapse_weight": "synapse",
    "dendrite_bias": "dendrite",
    "cable_weight": "dendrite",
    "soma_bias": "soma",
}
Part = dict[str, slice]  # which somas, dendrites and synapses a rank holds


def _parts(whole: Connectivity, ranks: int) -> list[Part]:
    """Which stretch of somas, dendrites and synapses each rank holds, as torch.chunk cuts somas."""
    crow, soma_ptr = whole.crow_indices, whole.soma_ptr
    size = -(-whole.num_somas // ranks)
    parts = []
    for rank in range(ranks):
        somas = slice(min(rank * size, whole.num_somas), min((rank + 1) * size, whole.num_somas))
        rows = slice(int(soma_ptr[somas.start]), int(soma_ptr[somas.stop]))
        synapses = slice(int(crow[rows.start]), int(crow[rows.stop]))
        if rows.start == rows.stop:
            raise ValueError(
                f"Expected a soma with dendrites for each of {ranks} ranks, got none for {rank}"
            )
        parts.append({"soma": somas, "dendrite": rows, "synapse": synapses})
    return parts


def _part_of(whole: Connectivity, part: Part) -> Connectivity:
    somas, rows = part["soma"], part["dendrite"]
    crow = whole.crow_indices[rows.start : rows.stop + 1]
    soma_ptr = whole.soma_ptr[somas.start : somas.stop + 1]
    columns = whole.col_indices[part["synapse"]]
    return Connectivity(
        crow - crow[0],
        columns,
        soma_ptr - soma_ptr[0],
        whole.in_features,
        whole.in_shape,
        whole.channels_first,
    )


@torch.no_grad()
def _shard(
    parameter: torch.Tensor, slices: list[slice], mesh: DeviceMesh, source: int | None
) -> DTensor:
    """This rank's slice as a shard of equal size on all ranks, from the values of rank `source`."""
    values = parameter.detach().contiguous()
    if source is not None and not values.is_meta:
        dist.broadcast(values, group=mesh.get_group(), group_src=source)
    size = max(part.stop - part.start for part in slices)
    mine = values[slices[mesh.get_local_rank()]]
    local = mine.new_zeros(size)
    local[: mine.numel()] = mine
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def _check_agreement(connectivity: Connectivity, mesh: DeviceMesh) -> None:
    """ValueError unless all ranks of the mesh hold the same connectivity."""
    device = torch.device(mesh.device_type)
    mine = torch.tensor(list(bytes.fromhex(connectivity.digest)), dtype=torch.uint8, device=device)
    theirs = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(theirs, mine, group=mesh.get_group())
    for rank, other in enumerate(theirs):
        if not torch.equal(mine, other):
            raise ValueError(
                f"Expected the same connectivity on all ranks, got another on rank {rank}"
            )
