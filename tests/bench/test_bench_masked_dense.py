"""The masked-dense peer: equal to a hand-written masked forward, exact zeros through training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels.benchmark.masked_dense import (
    MaskedDendriticLayer,
    dense_parameters,
    masked_dense_twin,
    trainable_parameters,
)
from dendrite_kernels.benchmark.training_step import TrainingStep

INPUTS, DENDRITES, SOMAS = 11, 12, 4


def masked_layer(seed: int = 0) -> MaskedDendriticLayer:
    """In float64, weights not masked beforehand; dendrite 5 has no input."""
    generator = torch.Generator().manual_seed(seed)
    dendrite = nn.Linear(INPUTS, DENDRITES, dtype=torch.float64)
    soma = nn.Linear(DENDRITES, SOMAS, dtype=torch.float64)
    for parameter in (*dendrite.parameters(), *soma.parameters()):
        nn.init.normal_(parameter, generator=generator)
    dendrite_mask = torch.rand(DENDRITES, INPUTS, generator=generator) < 0.3
    dendrite_mask[5] = False
    soma_mask = torch.eye(SOMAS, dtype=torch.bool).repeat_interleave(DENDRITES // SOMAS, dim=1)
    return MaskedDendriticLayer(dendrite, dendrite_mask, soma, soma_mask)


def by_hand(layer: MaskedDendriticLayer, x: Tensor) -> Tensor:
    """The definition, one number at a time."""
    wd, ws = layer.dendrite.weight, layer.soma.weight
    y = torch.empty(len(x), SOMAS, dtype=x.dtype)
    for b in range(len(x)):
        a = []
        for r in range(DENDRITES):
            u = layer.dendrite.bias[r]
            for n in range(INPUTS):
                if layer.dendrite_mask[r, n]:
                    u = u + wd[r, n] * x[b, n]
            a.append(u if u > 0 else 0.1 * u)
        for s in range(SOMAS):
            v = layer.soma.bias[s]
            for r in range(DENDRITES):
                if layer.soma_mask[s, r]:
                    v = v + ws[s, r] * a[r]
            y[b, s] = v if v > 0 else 0.1 * v
    return y


def test_forward_is_the_masked_definition() -> None:
    layer = masked_layer()
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-12, atol=1e-12)
    assert layer(x[None, :, None]).shape == (1, 3, 1, SOMAS)


def test_masked_weights_are_exactly_0_through_training() -> None:
    layer = masked_layer()
    model = nn.Sequential(layer, nn.Linear(SOMAS, 3, dtype=torch.float64))
    step = TrainingStep(model, lr=0.1)
    bias_before = layer.dendrite.bias.detach().clone()
    for _ in range(20):
        step(torch.randn(8, INPUTS, dtype=torch.float64), torch.randint(3, (8,)))
    for linear, mask in ((layer.dendrite, layer.dendrite_mask), (layer.soma, layer.soma_mask)):
        assert torch.all(linear.weight[mask == 0] == 0)
        assert torch.all(linear.weight[mask == 1] != 0)
        assert linear.weight.grad is not None
        assert torch.all(linear.weight.grad[mask == 0] == 0)
    assert torch.all(layer.dendrite.bias != bias_before)  # biases are never masked


def test_masks_of_integers_mask_alike() -> None:
    layer = masked_layer()
    integers = MaskedDendriticLayer(
        layer.dendrite, layer.dendrite_mask, layer.soma, layer.soma_mask, mask_dtype=torch.int64
    )
    assert integers.dendrite_mask.dtype == torch.int64
    layer(torch.randn(8, INPUTS, dtype=torch.float64)).sum().backward()
    integers.mask_gradients()
    assert layer.dendrite.weight.grad is not None
    assert torch.all(layer.dendrite.weight.grad[layer.dendrite_mask == 0] == 0)
    assert torch.any(layer.dendrite.weight.grad != 0)


def test_without_gradient_masks_weights_would_move() -> None:
    layer = masked_layer()
    layer(torch.randn(8, INPUTS, dtype=torch.float64)).sum().backward()
    assert layer.dendrite.weight.grad is not None
    assert torch.any(layer.dendrite.weight.grad[layer.dendrite_mask == 0] != 0)


def test_parameter_counts() -> None:
    layer = masked_layer()
    model = nn.Sequential(layer, nn.Linear(SOMAS, 3))
    biases, output = DENDRITES + SOMAS, 3 * SOMAS + 3
    assert dense_parameters(model) == INPUTS * DENDRITES + DENDRITES * SOMAS + biases + output
    synapses = int(layer.dendrite_mask.sum())
    assert trainable_parameters(model) == synapses + DENDRITES + biases + output


def test_mask_shapes_are_checked() -> None:
    linears = nn.Linear(5, 6), nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"Expected dendrite_mask \[6, 5\], got \[5, 6\]"):
        MaskedDendriticLayer(linears[0], torch.ones(5, 6), linears[1], torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"Expected soma_mask \[2, 6\], got \[6, 2\]"):
        MaskedDendriticLayer(linears[0], torch.ones(6, 5), linears[1], torch.ones(6, 2))


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF", "dANN-GRF"])
@pytest.mark.parametrize("layers", [1, 2])
def test_twin_of_a_model_gives_its_logits_and_gradients(kind: str, layers: int) -> None:
    model = dk.models.build(kind, (8, 8), 12, 4, 9, 10, layers=layers, seed=3, init="paper")
    twin = masked_dense_twin(model)
    x, y = torch.rand(7, 64), torch.arange(7)
    torch.testing.assert_close(twin(x), model(x))
    for network in (model, twin):
        nn.functional.cross_entropy(network(x), y).backward()
    output = [
        [m for m in network.modules() if isinstance(m, nn.Linear)][-1] for network in (model, twin)
    ]
    assert output[0] is not output[1]
    torch.testing.assert_close(output[0].weight.grad, output[1].weight.grad)
    assert trainable_parameters(twin) == dense_parameters(model) == trainable_parameters(model)
    assert dense_parameters(twin) > 2 * dense_parameters(model)


def test_only_danns_have_a_twin() -> None:
    with pytest.raises(TypeError, match=r"Expected dendritic layers.*got Bilinear"):
        masked_dense_twin(nn.Sequential(nn.Bilinear(2, 2, 2)))
