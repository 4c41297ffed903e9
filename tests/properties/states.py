"""Properties of what becomes of a layer: its state, other formats, fewer and other synapses."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, plasticity
from tests import oracle
from tests.properties import layers, strategies, structures
from tests.properties.strategies import Draw
from tests.properties.twins import dense, owned

Ours = dk.DendriticLayer | dk.SparseLinear


@st.composite
def drawn(draw: Draw, linear: bool = True) -> Ours:
    """A layer of any options and dtype with random parameters; `linear`: or a SparseLinear."""
    c = draw(strategies.networks(image=True))
    one = layers.case(draw, c)
    chosen = layers.options(draw, one.dtype)
    bias = draw(st.booleans())
    if linear and draw(st.booleans()):
        del chosen["activation"], chosen["soma_activation"]
        layer: Ours = dk.SparseLinear(c, bias=bias, dtype=one.dtype, **chosen)
    else:
        layer = dk.DendriticLayer(c, bias=bias, dtype=one.dtype, **chosen)
    layers.filled(layer, one)
    return layer.train(draw(st.booleans()))


def options_of(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.OPTIONS}


def weight_of(layer: Ours) -> Tensor:
    return layer.get_parameter(layer.WEIGHT)


def like(layer: Ours, c: Connectivity) -> Any:
    """Another layer of this kind."""
    bias = layer.state_dict().get(layer.BIAS) is not None
    return type(layer)(c, bias=bias, dtype=weight_of(layer).dtype, **options_of(layer))


def alike(made: Any, layer: Any, frozen: bool = True) -> None:
    """The same connectivity, options and output, and in other memory the same parameters."""
    assert type(made) is type(layer)
    assert made.connectivity == layer.connectivity
    assert options_of(made) == options_of(layer)
    own, other = dict(layer.named_parameters()), dict(made.named_parameters())
    assert own.keys() == other.keys()
    for name, p in own.items():
        assert other[name].dtype == p.dtype
        assert torch.equal(other[name], p), name
        assert other[name].data_ptr() != p.data_ptr() or not p.numel()
        assert not frozen or other[name].requires_grad == p.requires_grad, name
    x = torch.linspace(-1, 1, 3 * layer.connectivity.in_features).reshape(3, -1)
    x = x.to(own[layer.WEIGHT].dtype)
    assert oracle.same(made(x), layer(x), "reference")  # dense layers are products of torch


def state(draw: Draw) -> None:
    """State dicts and files give the layer back; another network's state changes nothing."""
    layer = draw(drawn())
    saved = layer.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    alike(type(layer).from_state_dict(saved, **options_of(layer)), layer, frozen=False)
    c = layer.connectivity
    fresh = like(layer, c)
    fresh.load_state_dict(saved)
    alike(fresh, layer, frozen=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.safetensors")
        dk.save(layer, path)
        loaded = dk.load(path)
    alike(loaded, layer)
    structures.same(loaded.connectivity, c)
    assert loaded.training == layer.training
    if c.num_somas == 1 and c.num_dendrites == 1:
        return
    pointer = [0, c.num_dendrites] if c.num_somas > 1 else [0, 1, c.num_dendrites]
    other = Connectivity(c.crow_indices, c.col_indices, pointer, c.in_features)
    changed = like(layer, other)
    before = [p.clone() for p in changed.parameters()]
    with pytest.raises(RuntimeError, match=r"Expected .* got"):
        changed.load_state_dict(saved)
    assert all(map(torch.equal, before, changed.parameters()))


def tree_state(draw: Draw) -> None:
    dtype = draw(strategies.dtypes)
    tree = draw(layers.trees(dtype))
    one = layers.case(draw, tree.connectivity)
    layers.filled(tree, one)
    alike(dk.DendriticTree.from_state_dict(tree.state_dict(), **options_of(tree)), tree, False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tree.safetensors")
        dk.save(nn.Sequential(tree), path)
        alike(dk.load(path)[0], tree)


def masked_dense(draw: Draw) -> None:
    """To two masked layers and back, also where the dendrites of a soma are not together."""
    layer: Any = draw(drawn(linear=False))
    c, rng = layer.connectivity, draw(strategies.generators)
    dendrite, mask, soma, soma_mask = dk.interop.to_masked_dense(layer)
    assert mask.equal(c.to_mask())
    assert soma_mask.equal(owned(c.soma_ptr))
    assert dendrite.weight.double().equal(dense(mask, layer.synapse_weight))
    assert soma.weight.double().equal(dense(soma_mask, layer.cable_weight))
    names = {"activation": layer.activation, "negative_slope": layer.negative_slope}
    # Stably sorted by soma they come back: each soma keeps the order of its own dendrites.
    keys = np.empty(c.num_dendrites)
    for a, b in zip(c.soma_ptr[:-1].tolist(), c.soma_ptr[1:].tolist(), strict=True):
        keys[a:b] = np.sort(rng.random(b - a))
    order = torch.from_numpy(keys.argsort(kind="stable"))
    with torch.no_grad():
        dendrite.weight.copy_(dendrite.weight[order])
        soma.weight.copy_(soma.weight[:, order])
        if dendrite.bias is not None:
            dendrite.bias.copy_(dendrite.bias[order])
    back = dk.interop.from_masked_dense(dendrite, mask[order], soma, soma_mask[:, order], **names)
    back.soma_activation, back.precision, back.init = (
        layer.soma_activation,
        layer.precision,
        layer.init,
    )
    alike(back, layer, frozen=False)


def pruned_linear(draw: Draw) -> None:
    """from_pruned and convert of an nn.Linear under a mask, to_scipy and back."""
    inputs, outputs = draw(st.integers(1, 30)), draw(st.integers(1, 20))
    mask = torch.from_numpy(draw(strategies.masks(outputs, inputs)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    linear = nn.Linear(inputs, outputs, bias=draw(st.booleans()), dtype=dtype)
    with torch.no_grad():
        rng = draw(strategies.generators)
        linear.weight.copy_(strategies.numbers(rng, False, outputs, inputs))
    prune.custom_from_mask(linear, "weight", mask)
    converted, _ = dk.interop.convert(nn.Sequential(linear))
    for layer in (dk.interop.from_pruned(linear), converted[0]):
        assert layer.connectivity.to_mask().equal(mask)
        assert layer.weight.equal(linear.weight[mask])
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or layer.bias.equal(linear.bias)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    matrix = dk.interop.to_scipy(layer)
    assert torch.from_numpy(matrix.toarray()).equal(linear.weight.detach())
    alike(dk.interop.from_scipy(matrix.asformat("coo"), bias), layer)


def smallest(c: Connectivity, weight: Tensor, counts: list[int]) -> Tensor:
    """bool [nnz]: the `counts` [R] of each row with least |weight|, of equal ones the later."""
    going = torch.zeros(c.nnz, dtype=torch.bool)
    size = weight.detach().double().abs().tolist()
    crow = c.crow_indices.tolist()
    for r, count in enumerate(counts):
        synapses = sorted(range(crow[r], crow[r + 1]), key=lambda k: (size[k], -k))
        going[synapses[:count]] = True
    return going


def pruned(draw: Draw) -> None:
    """prune(amount) drops the smallest of each dendrite and keeps all else."""
    layer = draw(drawn())
    c = layer.connectivity
    amount = draw(st.one_of(st.integers(0, 9), st.floats(0, 1)))
    fan_in = c.crow_indices.diff().tolist()
    is_number = isinstance(amount, int)
    counts = [min(amount, k) if is_number else round(amount * k) for k in fan_in]
    left = layer.prune(amount)
    stay = ~smallest(c, weight_of(layer), counts)
    mask = c.to_mask()
    mask[mask.clone()] = stay
    structures.same(
        left.connectivity,
        Connectivity.from_mask(
            mask, c.soma_ptr, in_shape=c.in_shape, channels_first=c.channels_first
        ),
    )
    assert options_of(left) == options_of(layer)
    assert left.training == layer.training
    for name, p in layer.named_parameters():
        values = p[stay] if name == layer.WEIGHT else p
        assert left.get_parameter(name).equal(values), name
        assert left.get_parameter(name).requires_grad == p.requires_grad


def moving(c: Connectivity, free: Tensor, fraction: float) -> list[int]:
    """How many synapses each dendrite exchanges, where it may grow in `free` [R, N]."""
    return [
        min(max(round(fraction * k), int(fraction > 0)), k, places)
        for k, places in zip(c.crow_indices.diff().tolist(), free.sum(1).tolist(), strict=True)
    ]


def by_place(c: Connectivity, values: Tensor) -> Tensor:
    """[R, N] of numbers [nnz], NaN where there is no synapse."""
    matrix = values.new_full((c.num_dendrites, c.in_features), torch.nan)
    matrix[c.to_mask()] = values
    return matrix


def rewired(draw: Draw) -> None:
    """Synapses of least |weight| move to free places, best scores first; kept ones stay as are."""
    layer = draw(drawn())
    weight = weight_of(layer).requires_grad_()
    c, rng = layer.connectivity, draw(strategies.generators)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.from_numpy(rng.standard_normal(c.nnz)).to(weight.dtype)
        optimizer.step()
    region, scores, count = None, None, draw(st.integers(1, 5))
    free = ~c.to_mask()
    if draw(st.booleans()):
        union, is_new = plasticity.candidates(c, count, generator=generator)
        assert (union.to_mask() & c.to_mask()).equal(c.to_mask())
        extra = union.to_mask() & free
        assert union.to_mask()[union.to_mask()].equal(torch.ones(union.nnz, dtype=torch.bool))
        assert extra.sum(1).equal(free.sum(1).clamp(max=count))
        assert extra[union.to_mask()].equal(is_new)
        region, free = union, extra
        scores = torch.from_numpy(rng.permutation(union.nnz) + 1.0)
    fraction = draw(st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]))
    counts = moving(c, free, fraction)
    gone = by_place(c, smallest(c, weight, counts).double()) == 1
    beside = [weight.grad, optimizer.state[weight]["momentum_buffer"]]
    before = [by_place(c, t.detach()) for t in (weight, *beside)]
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    grow: Any = "random" if scores is None else scores
    new = plasticity.rewire(
        layer, optimizer, fraction=fraction, grow=grow, region=region, generator=generator
    )
    assert layer.connectivity is new
    kept = c.to_mask() & ~gone
    grown = new.to_mask() & ~kept
    assert (new.to_mask() & kept).equal(kept)
    assert grown.sum(1).tolist() == counts
    assert not (grown & ~free).any()
    if scores is not None:
        table = by_place(region, scores).masked_fill(~free, -1)
        for row, wanted in enumerate(counts):
            assert set(table[row].topk(wanted).indices.tolist()) == set(
                grown[row].nonzero().flatten().tolist()
            )
    for tensor, was in zip((weight, *beside), before, strict=True):
        now = by_place(new, tensor.detach())
        assert now[kept].equal(was[kept])
        assert not now[grown].any()
    twin = like(layer, c)
    plasticity.adopt(twin, layer.state_dict())
    alike(twin, layer, frozen=False)
    plasticity.adopt(twin, saved)
    assert twin.connectivity == c
