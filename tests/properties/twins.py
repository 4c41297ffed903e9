"""Dense twins of layers, and the comparison of a call with its twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests.properties import bounds
from tests.properties.bounds import LOW, PIECEWISE, Activation, Level, Rounding

Maybe = Tensor | None
Leaves = Mapping[str, Maybe]  # parameters by name


class Place(NamedTuple):
    """Where the gradient of a parameter is in those of a twin."""

    level: int
    field: str  # of bounds.Gradients
    mask: Tensor | None  # the entries of a matrix that exist


class Twin(NamedTuple):
    """The same network as dense matrices in float64."""

    inputs: int
    levels: list[Level]
    places: dict[str, Place]
    rounds_x: bool
    terms: int  # at most so many numbers are added on the way through the network and back


def dense(mask: Tensor, weight: Tensor) -> Tensor:
    """In float64: the weights in the places of the mask, row by row."""
    matrix = torch.zeros(mask.shape, dtype=torch.float64)
    matrix[mask] = weight.detach().double()
    return matrix


def owned(pointer: Tensor) -> Tensor:
    """bool [S, R]: which dendrites a soma has."""
    place = torch.arange(int(pointer[-1]))
    return (place >= pointer[:-1, None]) & (place < pointer[1:, None])


def _wide(bias: Maybe) -> Maybe:
    return None if bias is None else bias.detach().double()


def _terms(*masks: Tensor) -> int:
    """The longest row and the longest column of each, added up."""
    return sum(int(m.sum(d).max()) for m in masks for d in (0, 1) if m.numel())


def activation(options: Mapping[str, Any], soma: bool = False) -> Activation:
    name = (soma and options.get("soma_activation")) or options["activation"]
    return Activation(name, options["negative_slope"])


def of_linear(c: Connectivity, weight: Tensor, bias: Maybe, options: Mapping[str, Any]) -> Twin:
    """Of sparse_linear, with leaves "weight" and "bias"."""
    mask = c.to_mask()
    level = Level(None, dense(mask, weight), _wide(bias), Activation("identity", 1.0))
    places = {"weight": Place(0, "synapses", mask), "bias": Place(0, "bias", None)}
    return Twin(c.in_features, [level], places, options["precision"] is not None, _terms(mask))


def of_layer(c: Connectivity, leaves: Leaves, options: Mapping[str, Any]) -> Twin:
    """Of dendritic_layer, with the names of its parameters."""
    weight, bias, cable, soma_bias = (leaves.get(n) for n in dk.DendriticLayer.PARAMETERS)
    assert weight is not None
    assert cable is not None
    mask, somas = c.to_mask(), owned(c.soma_ptr)
    levels = [
        Level(None, dense(mask, weight), _wide(bias), activation(options)),
        Level(dense(somas, cable), None, _wide(soma_bias), activation(options, soma=True)),
    ]
    places = {
        "synapse_weight": Place(0, "synapses", mask),
        "dendrite_bias": Place(0, "bias", None),
        "cable_weight": Place(1, "below", somas),
        "soma_bias": Place(1, "bias", None),
    }
    rounds = options["precision"] is not None
    return Twin(c.in_features, levels, places, rounds, _terms(mask, somas))


def of_tree(tree: dk.DendriticTree) -> Twin:
    """With the names of its parameters."""
    options = {name: getattr(tree, name) for name in tree.OPTIONS}
    leaves = dict(tree.named_parameters())
    masks = [tree.connectivity.to_mask()]
    levels = [
        Level(
            None,
            dense(masks[0], tree.synapse_weight),
            _wide(leaves.get("bias.0")),
            activation(options),
        )
    ]
    places = {"synapse_weight": Place(0, "synapses", masks[0])}
    for i, (children, own) in enumerate(zip(tree.chains, tree.level_synapses, strict=True), 1):
        below = owned(children.crow_indices)
        synapses = None
        places[f"cable.{i - 1}"] = Place(i, "below", below)
        if own is not None:
            mask = own.to_mask()
            synapses = dense(mask, leaves[f"level_weight.{i}"])
            places[f"level_weight.{i}"] = Place(i, "synapses", mask)
            masks.append(mask)
        masks.append(below)
        phi = activation(options, soma=i == len(tree.chains))
        cable = dense(below, leaves[f"cable.{i - 1}"])
        levels.append(Level(cable, synapses, _wide(leaves.get(f"bias.{i}")), phi))
    places |= {f"bias.{i}": Place(i, "bias", None) for i in range(len(levels))}
    rounds = tree.precision is not None
    return Twin(tree.connectivity.in_features, levels, places, rounds, _terms(*masks))


def rounding(twin: Twin, dtype: torch.dtype, samples: int, whole: bool, fused: bool) -> Rounding:
    """Of the twin's results: `whole` numbers give exact sums where no activation rounds.

    `fused`: sums of low precision are float32 and rounded once, not level by level.
    """
    names = {level.activation.name for level in twin.levels}
    slopes = [v.activation.slope for v in twin.levels if v.activation.name == "leaky_relu"]
    powers = all(math.frexp(slope)[0] in (0, 0.5) for slope in slopes)
    stages = 6 * len(twin.levels) if dtype in LOW and not fused else 0
    exact = whole and powers and names <= set(PIECEWISE) and not stages
    length = twin.terms + samples + 16 * len(twin.levels)
    return Rounding(dtype, length, stages, exact)


def compare(
    run: Callable[[], Tensor],
    x: Tensor,
    leaves: Leaves,
    grad: Tensor,
    twin: Twin,
    *,
    whole: bool = False,
    fused: bool = True,
) -> None:
    """y of `run` and the gradients of x and the leaves, for the gradient of y [..., outputs]."""
    samples = math.prod(grad.shape[:-1])
    rounds = rounding(twin, x.dtype, samples, whole, fused)
    results = bounds.network(
        x.detach().double().reshape(samples, twin.inputs),
        twin.levels,
        grad.double().reshape(samples, grad.shape[-1]),
        rounds,
        twin.rounds_x,
    )
    y = run()
    check = results.rounding.check
    check("y", y.detach(), results.y.shaped(grad.shape))
    wanted = {n: t for n, t in {"x": x, **leaves}.items() if t is not None and t.requires_grad}
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    for name, got in zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True):
        if name == "x":
            check("gradient of x", got, results.x.shaped(x.shape))
            continue
        level, field, mask = twin.places[name]
        right: bounds.Sum = getattr(results.levels[level], field)
        check(f"gradient of {name}", got, right if mask is None else right.at(mask))
