"""Properties of functions, layers and trees: values and all gradients are those of dense twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests.functional.test_errors import BAD_TENSORS, Change
from tests.properties import strategies, twins
from tests.properties.strategies import Draw, laid_out, numbers
from tests.properties.twins import Maybe


@dataclass
class Case:
    """What all tensors of a call share."""

    draw: Draw
    dtype: torch.dtype
    rng: np.random.Generator
    whole: bool
    lead: tuple[int, ...]

    def constant(self, *shape: int) -> Tensor:
        values = numbers(self.rng, self.whole, *shape).to(self.dtype)
        return laid_out(values, self.draw(strategies.layouts))

    def leaf(self, *shape: int) -> Tensor:
        """Which may need no gradient."""
        return self.constant(*shape).requires_grad_(self.draw(st.integers(0, 3)) > 0)

    def bias(self, size: int) -> Maybe:
        return self.leaf(size) if self.draw(st.integers(0, 4)) else None

    def x(self, c: Connectivity) -> Tensor:
        """[..., N], or images where the inputs are some and x can be read in one way only."""
        shape = (c.in_features,)
        if c.in_shape is not None and self.draw(st.integers(0, 3)):
            gray = len(c.in_shape) == 2
            looks_like_rows = c.in_shape[-1] == c.in_features
            looks_like_a_channel = gray and len(self.lead) == 2 and self.lead[1] == 1
            if not looks_like_rows and not looks_like_a_channel:
                shape = c.in_shape
                if gray and len(self.lead) == 1 and self.draw(st.booleans()):
                    shape = (1, *shape)
        return self.leaf(*self.lead, *shape)


def case(draw: Draw, c: Connectivity) -> Case:
    lead = draw(strategies.leads)
    if max(c.in_features, c.num_dendrites) > 200:  # quick enough for the dense twin
        lead = draw(st.sampled_from([(1,), (2, 2), (2, 20), (33,), (65,)]))
    rng = draw(strategies.generators)
    return Case(draw, draw(strategies.dtypes), rng, draw(st.booleans()), lead)


def options(draw: Draw, dtype: torch.dtype) -> dict[str, Any]:
    """Of layers; a sparse one has its own among them."""
    rounds = dtype != torch.float64 and draw(st.integers(0, 4)) == 0
    return {
        "precision": "bf16" if rounds else None,
        "activation": draw(strategies.activations),
        "negative_slope": draw(strategies.slopes),
        "soma_activation": draw(st.none() | strategies.activations),
    }


def filled(layer: nn.Module, one: Case) -> None:
    """Random numbers in all parameters, some of which are frozen."""
    for p in layer.parameters():
        p.data.copy_(numbers(one.rng, one.whole, *p.shape))
        p.requires_grad_(one.draw(st.integers(0, 4)) > 0)


def sparse_linear(draw: Draw) -> None:
    c = draw(strategies.networks())
    one = case(draw, c)
    chosen = options(draw, one.dtype)
    x, weight, bias = one.x(c), one.leaf(c.nnz), one.bias(c.num_dendrites)
    twins.compare(
        lambda: dk.functional.sparse_linear(x, weight, bias, c, precision=chosen["precision"]),
        x,
        {"weight": weight, "bias": bias},
        one.constant(*one.lead, c.num_dendrites),
        twins.of_linear(c, weight, bias, chosen),
        whole=one.whole,
        fused=not c.is_dense,
    )


def dendritic_layer(draw: Draw) -> None:
    c = draw(strategies.networks())
    one = case(draw, c)
    chosen = options(draw, one.dtype)
    x = one.x(c)
    leaves = {
        "synapse_weight": one.leaf(c.nnz),
        "dendrite_bias": one.bias(c.num_dendrites),
        "cable_weight": one.leaf(c.num_dendrites),
        "soma_bias": one.bias(c.num_somas),
    }
    twins.compare(
        lambda: dk.functional.dendritic_layer(x, *leaves.values(), c, **chosen),
        x,
        leaves,
        one.constant(*one.lead, c.num_somas),
        twins.of_layer(c, leaves, chosen),
        whole=one.whole,
        fused=not c.is_dense,
    )


def linear_module(draw: Draw) -> None:
    c = draw(strategies.networks(image=True))
    one = case(draw, c)
    chosen = options(draw, one.dtype)
    layer = dk.SparseLinear(
        c, bias=draw(st.booleans()), precision=chosen["precision"], dtype=one.dtype
    )
    filled(layer, one)
    x = one.x(c)
    twins.compare(
        lambda: layer(x),
        x,
        dict(layer.named_parameters()),
        one.constant(*one.lead, c.num_dendrites),
        twins.of_linear(c, layer.weight, layer.bias, chosen),
        whole=one.whole,
        fused=not c.is_dense,
    )


def layer_module(draw: Draw) -> None:
    """Its dendrites too."""
    c = draw(strategies.networks(image=True))
    one = case(draw, c)
    chosen = options(draw, one.dtype)
    layer = dk.DendriticLayer(c, bias=draw(st.booleans()), dtype=one.dtype, **chosen)
    filled(layer, one)
    x = one.x(c)
    leaves = dict(layer.named_parameters())
    twin = twins.of_layer(c, leaves, chosen)
    grad = one.constant(*one.lead, c.num_somas)
    twins.compare(lambda: layer(x), x, leaves, grad, twin, whole=one.whole, fused=not c.is_dense)
    below = {name: leaves.get(name) for name in ("synapse_weight", "dendrite_bias")}
    twins.compare(
        lambda: layer.dendrites(x),
        x,
        below,
        one.constant(*one.lead, c.num_dendrites),
        twin._replace(levels=twin.levels[:1]),
        whole=one.whole,
        fused=False,
    )


@st.composite
def trees(draw: Draw, dtype: torch.dtype) -> dk.DendriticTree:
    c = draw(strategies.networks(image=True))
    pointer = c.soma_ptr.numpy()
    branching: list[Any] = [pointer]
    for _ in range(draw(st.integers(0, 2))):  # cut what a node owns in two, somewhere
        first = branching.pop(0)
        middle = (first[:-1] + first[1:]) // 2
        cuts = np.sort(np.concatenate([first, middle]))
        branching[:0] = [cuts, np.append(np.arange(0, cuts.size - 1, 2), cuts.size - 1)]
    synapses: list[Connectivity | None] = []
    for level in branching:
        nodes = len(level) - 1
        mask = draw(strategies.masks(nodes, c.in_features)) if draw(st.booleans()) else None
        synapses.append(None if mask is None else Connectivity.from_mask(mask))
    return dk.DendriticTree(
        c,
        branching,
        level_synapses=synapses,
        bias=draw(st.booleans()),
        dtype=dtype,
        **options(draw, dtype),
    )


def tree(draw: Draw) -> None:
    dtype = draw(strategies.dtypes)
    made = draw(trees(dtype))
    c = made.connectivity
    one = case(draw, c)
    one.dtype = dtype
    filled(made, one)
    x = one.x(c)
    twins.compare(
        lambda: made(x),
        x,
        dict(made.named_parameters()),
        one.constant(*one.lead, c.num_somas),
        twins.of_tree(made),
        whole=one.whole,
        fused=False,
    )


def portable(draw: Draw) -> None:
    """What runs without this package computes the same, whatever the layer."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    made = draw(trees(dtype))
    made.precision = None
    c = made.connectivity
    one = case(draw, c)
    one.dtype = dtype
    filled(made, one)
    plain = dk.interop.portable(made).requires_grad_(False)
    x = one.x(c)
    grad = one.constant(*one.lead, c.num_somas)
    twins.compare(lambda: plain(x), x, {}, grad, twins.of_tree(made), whole=one.whole)


MISTAKES: list[Change] = [
    *list(BAD_TENSORS.values())[:12],
    lambda t: t.tolist(),
    lambda t: t[..., None],
    lambda t: t.bool(),
]


def mistakes(draw: Draw) -> None:
    """A good call with one bad tensor raises, and says what was expected."""
    c = draw(strategies.networks())
    one = case(draw, c)
    call = {
        "x": one.constant(*one.lead, c.in_features),
        "synapse_weight": one.constant(c.nnz),
        "dendrite_bias": one.constant(c.num_dendrites),
        "cable_weight": one.constant(c.num_dendrites),
        "soma_bias": one.constant(c.num_somas),
    }
    function: Any = dk.functional.dendritic_layer
    if draw(st.booleans()):
        function = dk.functional.sparse_linear
        call = {"x": call["x"], "weight": call["synapse_weight"], "bias": call["dendrite_bias"]}
    name = draw(st.sampled_from(sorted(call)))
    good = call[name]
    bad: Any = draw(st.sampled_from(MISTAKES))(good) if good.numel() else good[..., None]
    if isinstance(bad, Tensor) and (bad.dtype, bad.device) == (good.dtype, good.device):
        shapes = (bad.shape[-1:], good.shape[-1:]) if name == "x" else (bad.shape, good.shape)
        if shapes[0] == shapes[1]:
            return  # another batch, or the same
    with pytest.raises((ValueError, TypeError), match=r"Expected .* got"):
        function(**{**call, name: bad}, connectivity=c)
