"""The paper's twelve families of networks, sparse wherever a mask was and dense wherever none was.

                    synapses (N -> D S)          dendrites -> somas (D S -> S)
    dANN-R/LRF/GRF  random / receptive fields    cable: each dendrite feeds its own soma
    pdANN           dense                        cable
    sANN(-R/..)     random / receptive fields    random positions
    psANN           dense                        random positions
    vANN            dense                        dense
    vANN-R/LRF/GRF  random / receptive fields    dense

Source: Chavlis & Poirazi (2025); docs/equations.md, sections 4 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import nn

from . import connectivity
from . import shunting as shunting  # dk.models.shunting
from ._validate import check_size, image_of
from .gates import ContextGate
from .nn import DendriticLayer, Init, SparseLinear, _check_init, glorot_bound
from .structure import Connectivity
from .tree import DendriticTree

Kind = Literal[
    "dANN-R", "dANN-LRF", "dANN-GRF", "pdANN", "sANN", "sANN-LRF", "sANN-GRF", "psANN", "vANN",
    "vANN-R", "vANN-LRF", "vANN-GRF",
]  # fmt: skip

# kind -> (rule of the synapses, rule of the dendrite -> soma stage)
_KINDS: dict[Kind, tuple[str, str]] = {
    "dANN-R": ("random", "cable"),
    "dANN-LRF": ("local", "cable"),
    "dANN-GRF": ("global", "cable"),
    "pdANN": ("dense", "cable"),
    "sANN": ("random", "random"),
    "sANN-LRF": ("local", "random"),
    "sANN-GRF": ("global", "random"),
    "psANN": ("dense", "random"),
    "vANN": ("dense", "dense"),
    "vANN-R": ("random", "dense"),
    "vANN-LRF": ("local", "dense"),
    "vANN-GRF": ("global", "dense"),
}
_NEGATIVE_SLOPE = 0.1


def _synapses(
    rule: str,
    in_shape: tuple[int, int],
    channels: int,
    channels_first: bool,
    somas: int,
    dendrites: int,
    synapses: int,
    rng: np.random.Generator,
) -> Connectivity:
    inputs = math.prod(in_shape) * channels
    if rule in ("random", "dense"):
        if rule == "random":
            c = connectivity.random(inputs, somas, dendrites, synapses, seed=rng)
        else:
            c = connectivity.all_to_all(inputs, somas, dendrites)
        image = image_of(in_shape, channels, channels_first)
        return Connectivity(c.crow_indices, c.col_indices, c.soma_ptr, inputs, *image)
    fields = {
        "local": connectivity.local_receptive_fields,
        "global": connectivity.global_receptive_fields,
    }[rule]
    return fields(
        in_shape,
        somas,
        dendrites,
        synapses,
        channels=channels,
        channels_first=channels_first,
        seed=rng,
    )


def _linear(inputs: int, outputs: int, init: Init) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    if init == "paper":
        nn.init.uniform_(
            linear.weight, -glorot_bound(inputs, outputs), glorot_bound(inputs, outputs)
        )
    else:
        nn.init.kaiming_uniform_(linear.weight, a=_NEGATIVE_SLOPE)
    nn.init.zeros_(linear.bias)
    return linear


def _sparse_or_dense(connections: Connectivity, init: Init) -> nn.Module:
    if connections.is_dense:
        return _linear(connections.in_features, connections.num_dendrites, init)
    return SparseLinear(connections, init=init, negative_slope=_NEGATIVE_SLOPE)


def _stage(
    synapses: Connectivity, soma_rule: str, init: Init, rng: np.random.Generator, dropout: float
) -> list[nn.Module]:
    """One dendrosomatic layer: the modules from its inputs to its somas' activation."""
    if soma_rule == "cable" and dropout == 0:
        return [DendriticLayer(synapses, init=init, negative_slope=_NEGATIVE_SLOPE)]
    to_soma = _to_somas(synapses, soma_rule, init, rng)
    modules: list[nn.Module] = []
    for linear in (_sparse_or_dense(synapses, init), to_soma):
        modules += [linear, nn.LeakyReLU(_NEGATIVE_SLOPE)]
        if dropout > 0:
            modules.append(nn.Dropout(dropout))
    return modules


def _to_somas(synapses: Connectivity, rule: str, init: Init, rng: np.random.Generator) -> nn.Module:
    """From dendrites to somas, where these are a module of their own."""
    rows, somas = synapses.num_dendrites, synapses.num_somas
    if rule == "cable":
        own = connectivity.chain(synapses.soma_ptr)
        return SparseLinear(own, init=init, negative_slope=_NEGATIVE_SLOPE)
    if rule == "random":  # D * S positions out of (D * S) x S
        drawn = connectivity.random(rows, somas, 1, rows // somas, seed=rng)
        return _sparse_or_dense(drawn, init)
    return _linear(rows, somas, init)


def build(
    kind: Kind,
    in_shape: Sequence[int],
    somas: int,
    dendrites: int,
    synapses: int,
    classes: int,
    *,
    channels: int = 1,
    channels_first: bool = False,
    layers: int = 1,
    seed: int | np.random.Generator | None = None,
    init: Init = "paper",
    dropout: float = 0.0,
) -> nn.Sequential:
    """A network of the paper: `layers` dendrosomatic layers and a dense output layer.

    Args:
        kind: dANN-R, dANN-LRF, dANN-GRF, pdANN, sANN, sANN-LRF, sANN-GRF, psANN, vANN, vANN-R,
            vANN-LRF or vANN-GRF.
        in_shape: (H, W) of the images, which arrive flattened as [..., H * W * channels], or as
            they are, see DendriticLayer. A family whose first layer is an nn.Linear (psANN, vANN,
            or where K takes in every input) takes flattened ones only: put an nn.Flatten before.
        somas, dendrites, synapses: S per layer, D per soma, K per dendrite. Receptive fields count
            pixels: K * channels synapses. Families with dense synapses ignore K.
        classes: number of outputs.
        channels: of the images, channels last.
        channels_first: they come first, as torch stores images: input c * H * W + row * W + column.
        layers: 1 to 10. From the second on, the somas below form a pseudo-image
            (connectivity.pseudo_image).
        seed: of the connectivity, drawn layer by layer from one generator. Parameters come from
            torch's generator (torch.manual_seed).
        init: "paper" or "fan_in", see DendriticLayer.
        dropout: the probability of nn.Dropout after each activation, of dendrites and of somas, as
            in the article's code. A dANN or pdANN with dropout is made of two SparseLinear layers
            instead of a DendriticLayer, whose dendrites nothing can reach; it is slower.

    Returns:
        nn.Sequential that maps [..., H * W * channels], or images, to logits [..., classes].

    Raises:
        ValueError: an unknown kind, or sizes that do not fit.
    """
    if kind not in _KINDS:
        raise ValueError(f"Expected a kind of {list(_KINDS)}, got {kind!r}")
    if check_size("layers", layers) > 10:
        raise ValueError(f"Expected 1 to 10 layers, got {layers}")
    if not isinstance(in_shape, Sequence) or len(in_shape) != 2:
        raise ValueError(f"Expected in_shape (H, W), got {in_shape!r}")
    shape = check_size("H", in_shape[0]), check_size("W", in_shape[1])
    check_size("classes", classes)
    _check_init(init)
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout from 0 to less than 1, got {dropout}")
    synapse_rule, soma_rule = _KINDS[kind]
    rng = np.random.default_rng(seed)
    modules: list[nn.Module] = []
    for _ in range(layers):
        drawn = _synapses(
            synapse_rule, shape, channels, channels_first, somas, dendrites, synapses, rng
        )
        modules += _stage(drawn, soma_rule, init, rng, dropout)
        shape, channels = connectivity.pseudo_image(somas), 1
    return nn.Sequential(*modules, _linear(somas, classes, init))


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, each stored once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_dense_parameters(model: nn.Module) -> int:
    """What the same network stores as dense layers under masks."""
    total = 0
    for module in model.modules():
        if isinstance(module, (ContextGate, DendriticLayer, SparseLinear)):
            c = module.connectivity
            total += (c.in_features + 1) * c.num_dendrites
            if isinstance(module, DendriticLayer):
                total += (c.num_dendrites + 1) * c.num_somas
        elif isinstance(module, DendriticTree):
            inputs = module.connectivity.in_features
            total += (inputs + 1) * module.connectivity.num_dendrites
            for children, synapses in zip(module.chains, module.level_synapses, strict=True):
                columns = children.in_features + (0 if synapses is None else inputs)
                total += (columns + 1) * children.num_dendrites
        elif isinstance(module, nn.Linear):
            total += sum(p.numel() for p in module.parameters())
    return total
