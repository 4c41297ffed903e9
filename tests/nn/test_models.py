"""The twelve families: what they store, what they compute, how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, models
from dendrite_kernels.models import build, count_dense_parameters, count_parameters
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]

# kind -> (synapses: sampled pixels, sampled inputs or all; dendrites -> somas: own, sampled or all)
KINDS = {
    "dANN-R": ("inputs", "own"),
    "dANN-LRF": ("pixels", "own"),
    "dANN-GRF": ("pixels", "own"),
    "pdANN": ("all", "own"),
    "sANN": ("inputs", "sampled"),
    "sANN-LRF": ("pixels", "sampled"),
    "sANN-GRF": ("pixels", "sampled"),
    "psANN": ("all", "sampled"),
    "vANN": ("all", "all"),
    "vANN-R": ("inputs", "all"),
    "vANN-LRF": ("pixels", "all"),
    "vANN-GRF": ("pixels", "all"),
}
H, W, S, D, K, C = 8, 7, 12, 3, 9, 5  # K fits the pseudo-image 4 x 3 of the somas


def make(kind: str, layers: int = 1, channels: int = 1, **options: Any) -> nn.Sequential:
    return build(kind, (H, W), S, D, K, C, channels=channels, layers=layers, **options)


def trainable(kind: str, n: int, s: int, d: int, k: int, c: int, layers: int, channels: int) -> int:
    """The formula of docs/equations.md, section 7 (Chavlis & Poirazi 2025)."""
    synapses, somas = KINDS[kind]
    total = (s + 1) * c
    for layer in range(layers):
        inputs = n * channels if layer == 0 else s
        fan_in = {
            "inputs": k,
            "pixels": k * channels if layer == 0 else k,
            "all": inputs,
        }[synapses]
        to_somas = d * s * s if somas == "all" else d * s
        total += (fan_in + 1) * d * s + to_somas + s
    return total


def dense(n: int, s: int, d: int, c: int, layers: int, channels: int) -> int:
    total = (s + 1) * c
    for layer in range(layers):
        inputs = n * channels if layer == 0 else s
        total += (inputs + 1) * d * s + (d * s + 1) * s
    return total


def test_every_kind_is_tested() -> None:
    assert list(KINDS) == list(models._KINDS)


# Sizes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts(kind: str, layers: int, channels: int) -> None:
    model = make(kind, layers, channels, seed=0)
    expected = trainable(kind, H * W, S, D, K, C, layers, channels)
    assert count_parameters(model) == expected
    assert sum(p.numel() for p in model.parameters()) == expected
    assert count_dense_parameters(model) == dense(H * W, S, D, C, layers, channels)


@pytest.mark.parametrize("kind", ["dANN-LRF", "sANN", "vANN-GRF"])
def test_ten_layers(backend: str, kind: str) -> None:
    model = make(kind, 10, seed=0)
    assert count_parameters(model) == trainable(kind, H * W, S, D, K, C, 10, 1)
    assert count_dense_parameters(model) == dense(H * W, S, D, C, 10, 1)
    assert model(torch.randn(2, H * W)).shape == (2, C)


@pytest.mark.parametrize(
    ("kind", "dendrites", "somas", "expected"),
    [
        ("dANN-R", 16, 64, 19_146),
        ("dANN-LRF", 16, 64, 19_146),
        ("dANN-GRF", 16, 64, 19_146),
        ("pdANN", 16, 64, 805_578),
        ("vANN", 16, 64, 870_090),
        ("dANN-R", 8, 256, 39_690),
        ("dANN-LRF", 32, 256, 150_282),
        ("dANN-GRF", 64, 512, 595_466),
        ("dANN-R", 4, 128, 10_634),
        ("vANN", 4, 128, 468_874),
    ],
)
def test_published_counts(kind: str, dendrites: int, somas: int, expected: int) -> None:
    model = build(kind, (28, 28), somas, dendrites, 16, 10, seed=0)
    assert count_parameters(model) == expected


def test_published_dense_counts() -> None:
    for dendrites, somas, expected in [
        (16, 64, 870_090),
        (8, 256, 2_134_794),
        (32, 256, 8_530_698),
    ]:
        model = build("dANN-R", (28, 28), somas, dendrites, 16, 10, seed=0)
        assert count_dense_parameters(model) == expected


def test_only_what_trains_is_counted() -> None:
    model = make("dANN-R", seed=0)
    model[0].requires_grad_(False)
    assert count_parameters(model) == (S + 1) * C
    assert count_dense_parameters(model) == dense(H * W, S, D, C, 1, 1)


# Structure


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_where_a_mask_was_and_dense_where_none_was(kind: str, layers: int) -> None:
    model = make(kind, layers, seed=0)
    synapses, somas = KINDS[kind]
    first = nn.Linear if synapses == "all" else dk.SparseLinear
    second = {"sampled": dk.SparseLinear, "all": nn.Linear}
    stage: list[type[nn.Module]] = (
        [dk.DendriticLayer]
        if somas == "own"
        else [first, nn.LeakyReLU, second[somas], nn.LeakyReLU]
    )
    assert [type(m) for m in model] == [*stage * layers, nn.Linear]
    for module in model:
        if isinstance(module, nn.LeakyReLU):
            assert module.negative_slope == 0.1
        if isinstance(module, dk.DendriticLayer):
            assert module.connectivity.is_dense == (synapses == "all")
            assert (module.activation, module.negative_slope) == ("leaky_relu", 0.1)
        if isinstance(module, (dk.DendriticLayer, dk.SparseLinear)):  # nothing of two dimensions
            assert all(p.dim() == 1 for p in module.parameters())


def test_every_input_sampled_is_dense() -> None:
    """K = N leaves no mask: the matrix product serves."""
    model = build("vANN-R", (3, 3), 4, 2, 9, 3, seed=0)
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight.shape == (8, 9)
    assert isinstance(build("sANN", (3, 3), 1, 2, 4, 3, seed=0)[2], nn.Linear)  # one soma


# Function


def masked_dense(model: nn.Sequential, x: Tensor) -> Tensor:
    """What the model computes, with whole matrices."""
    for m in model:
        if isinstance(m, dk.DendriticLayer):
            x = dk.reference.dendritic_layer(
                x, m.synapse_weight, m.dendrite_bias, m.cable_weight, m.soma_bias, m.connectivity
            )
        elif isinstance(m, dk.SparseLinear):
            weight = torch.zeros(m.connectivity.to_mask().shape, dtype=x.dtype)
            weight[m.connectivity.to_mask()] = m.weight.detach()
            x = F.linear(x, weight, m.bias)
        elif isinstance(m, nn.LeakyReLU):
            x = torch.where(x > 0, x, 0.1 * x)
        else:
            assert isinstance(m, nn.Linear)
            x = x @ m.weight.T + m.bias
    return x


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(backend: str, kind: str, layers: int) -> None:
    model = make(kind, layers, channels=3, seed=0).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 3, H * W * 3, dtype=torch.float64)
    logits = model(x)
    assert logits.shape == (2, 3, C)
    assert oracle.relative_error(logits, masked_dense(model, x)) < 1e-13
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(x[:0]).shape == (0, 3, C)
    assert model(x[0, 0]).shape == (C,)


def glorot(fan_in: int, fan_out: int) -> float:
    return math.sqrt(6 / (fan_in + fan_out))


@pytest.mark.parametrize("kind", KINDS)
def test_paper_start(kind: str) -> None:
    """Glorot's bound of the dense matrix everywhere, the output layer included; no biases."""
    s, d = 24, 8
    model = build(kind, (H, W), s, d, K, C, seed=0)  # "paper" is the default
    limits = {"synapses": glorot(H * W, s * d), "somas": glorot(s * d, s), "output": glorot(s, C)}
    weights: dict[str, Tensor] = {"output": model[-1].get_parameter("weight")}
    if isinstance(model[0], dk.DendriticLayer):
        weights |= {"synapses": model[0].synapse_weight, "somas": model[0].cable_weight}
    else:
        weights["synapses"] = model[0].get_parameter("weight")
        weights["somas"] = model[2].get_parameter("weight")
    for name, weight in weights.items():
        largest = weight.abs().max().item()
        assert 0.95 * limits[name] < largest <= limits[name] * (1 + 1e-6), name
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("kind", KINDS)
def test_fan_in_start(kind: str) -> None:
    """The true fan-in, so that even ten layers pass the signal on."""
    model = build(kind, (16, 16), 64, 8, 16, 10, layers=5, seed=0, init="fan_in")
    x = torch.randn(500, 256)
    with torch.no_grad():
        signal = nn.Sequential(*list(model)[:-1])(x).square().mean().item()
        paper = build(kind, (16, 16), 64, 8, 16, 10, layers=5, seed=0)
        lost = nn.Sequential(*list(paper)[:-1])(x).square().mean().item()
    assert 0.05 < signal < 20
    assert lost < signal / 10
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


# How they are drawn


def structures(model: nn.Sequential) -> list[Connectivity]:
    return [m.connectivity for m in model if isinstance(m, (dk.DendriticLayer, dk.SparseLinear))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_connectivity(kind: str) -> None:
    a, b = (structures(make(kind, 2, seed=3)) for _ in range(2))
    assert a == b
    assert a == structures(make(kind, 2, seed=np.random.default_rng(3)))
    if kind not in ("pdANN", "vANN"):  # nothing is drawn for these
        other = structures(make(kind, 2, seed=4))
        assert all(x != y for x, y in zip(a, other, strict=True))


def test_torch_s_generator_decides_the_parameters() -> None:
    def parameters(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [p for p in make("sANN", 2, seed=3).parameters() if p.any()]

    a, b, other = parameters(0), parameters(0), parameters(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(not torch.equal(x, y) for x, y in zip(a, other, strict=True))


def test_without_a_seed_every_network_is_new() -> None:
    assert structures(make("dANN-R")) != structures(make("dANN-R"))


def official_draw(rng: np.random.Generator, inputs: int, outputs: int, ones: int) -> Array:
    """A mask [inputs, outputs] with so many ones, as the official code draws it."""
    mask = np.zeros((inputs, outputs), bool)
    mask.flat[rng.choice(inputs * outputs, size=ones, replace=False)] = True
    return mask


def test_dann_r_is_drawn_layer_by_layer_from_one_generator() -> None:
    theirs, ours = np.random.default_rng(7), np.random.default_rng(7)
    drawn = structures(make("dANN-R", 2, seed=ours))
    for c, inputs in zip(drawn, [H * W, S], strict=True):
        mask = official_draw(theirs, inputs, D * S, K * D * S)
        assert np.array_equal(c.to_mask().numpy(), mask.T)
        assert c.soma_ptr.tolist() == list(range(0, D * S + 1, D))
    assert theirs.bit_generator.state == ours.bit_generator.state  # and nothing else was drawn


def test_sann_draws_synapses_then_the_way_to_the_somas_layer_by_layer() -> None:
    theirs, ours = np.random.default_rng(7), np.random.default_rng(7)
    drawn = iter(structures(make("sANN", 2, seed=ours)))
    for inputs in (H * W, S):
        to_dendrites = official_draw(theirs, inputs, D * S, K * D * S)
        assert np.array_equal(next(drawn).to_mask().numpy(), to_dendrites.T)
        to_somas = official_draw(theirs, D * S, S, D * S)
        assert np.array_equal(next(drawn).to_mask().numpy(), to_somas.T)
    assert theirs.bit_generator.state == ours.bit_generator.state


def test_sann_leaves_dendrites_without_a_soma() -> None:
    """About 36 % feed no soma, 27 % more than one; the fan-in of somas varies.

    Source: Chavlis & Poirazi (2025); docs/equations.md, section 6.
    """
    to_somas = structures(build("psANN", (4, 4), 256, 16, 1, 10, seed=0))[0]
    assert (to_somas.num_dendrites, to_somas.in_features) == (256, 256 * 16)
    feeds = torch.bincount(to_somas.col_indices.long(), minlength=256 * 16)
    assert (feeds == 0).double().mean().item() == pytest.approx(0.366, abs=0.02)
    assert (feeds > 1).double().mean().item() == pytest.approx(0.265, abs=0.02)
    assert to_somas.nnz == 256 * 16
    assert to_somas.fan_in is None


FIELDS: dict[str, Callable[..., Connectivity]] = {
    "LRF": dk.connectivity.local_receptive_fields,
    "GRF": dk.connectivity.global_receptive_fields,
}


@pytest.mark.parametrize("rule", FIELDS)
@pytest.mark.parametrize("family", ["dANN", "vANN"])
def test_somas_are_the_pixels_of_the_next_layer(family: str, rule: str) -> None:
    rng = np.random.default_rng(5)
    first = FIELDS[rule]((H, W), S, D, K, channels=3, seed=rng)
    deeper = [FIELDS[rule]((4, 3), S, D, K, seed=rng) for _ in range(2)]  # 12 somas: 4 x 3
    drawn = structures(make(f"{family}-{rule}", 3, channels=3, seed=5))
    assert drawn == [first, *deeper]
    assert [c.in_shape for c in drawn] == [(H, W, 3), (4, 3), (4, 3)]


def test_the_generator_goes_on_where_the_network_stopped() -> None:
    rng = np.random.default_rng(0)
    assert structures(make("dANN-LRF", seed=rng)) != structures(make("dANN-LRF", seed=rng))


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dANN"}, r"kind of \['dANN-R', .*\], got 'dANN'"),
        ({"kind": "dann-r"}, "got 'dann-r'"),
        ({"layers": 0}, "layers.* got 0"),
        ({"layers": 11}, "10 layers.* got 11"),
        ({"layers": -1}, "layers.* got -1"),
        ({"classes": 0}, "classes .*got .*0"),
        ({"classes": -3}, "classes .*got .*-3"),
        ({"in_shape": (8,)}, r"in_shape \(H, W\).* got \(8,\)"),
        ({"in_shape": (8, 7, 3)}, r"in_shape \(H, W\).* got \(8, 7, 3\)"),
        ({"in_shape": (0, 7)}, "from 1 .* got 0"),
        ({"somas": 0}, "somas from 1 .* got 0"),
        ({"somas": -2}, "somas from 1 .* got -2"),
        ({"dendrites": 0}, "dendrites from 1 .* got 0"),
        ({"channels": 0}, "from 1 .* got 0"),
        ({"init": "glorot"}, r"init of \['fan_in', 'paper'\], got 'glorot'"),
    ],
)
@pytest.mark.parametrize("kind", ["dANN-R", "dANN-GRF", "pdANN", "vANN-LRF"])
def test_errors(kind: str, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "kind": kind, "in_shape": (H, W), "somas": S, "dendrites": D, "synapses": K, "classes": C,
    }  # fmt: skip
    build(**good)
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        build(**{**good, **change})


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF", "pdANN", "vANN"])
@pytest.mark.parametrize("in_shape", [(-8, -7), (-8, 7)])
def test_negative_images_are_refused(kind: str, in_shape: tuple[int, int]) -> None:
    """Even where the product is a fine number of inputs."""
    with pytest.raises(ValueError, match=r"Expected .* got .*-8"):
        build(kind, in_shape, S, D, K, C)
    with pytest.raises(ValueError, match=r"Expected .* got"):
        build(kind, (-8, 7), S, D, K, C, channels=-1)


@pytest.mark.parametrize(
    "change",
    [
        {"in_shape": (8.5, 7)},
        {"in_shape": 56},
        {"layers": 1.5},
        {"layers": "2"},
        {"classes": 2.5},
        {"somas": 12.0},
        {"channels": 1.0},
    ],
    ids=str,
)
def test_sizes_are_integers(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "in_shape": (H, W), "somas": S, "dendrites": D, "synapses": K, "classes": C,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=r"Expected .* got"):
        build("dANN-R", **{**good, **change})


@pytest.mark.parametrize(
    "kind", [kind for kind, (synapses, _) in KINDS.items() if synapses != "all"]
)
def test_more_synapses_than_inputs(kind: str) -> None:
    with pytest.raises(ValueError, match=r"Expected synapses <= 56, .* got 57"):
        build(kind, (8, 7), S, D, 57, C)
    with pytest.raises(ValueError, match=r"Expected synapses <= 12, .* got 13"):  # deeper: N is S
        build(kind, (8, 7), S, D, 13, C, layers=2)
    with pytest.raises(ValueError, match=r"Expected synapses from 1 .* got 0"):
        build(kind, (8, 7), S, D, 0, C)


def test_dense_synapses_ignore_their_number() -> None:
    for kind in ("pdANN", "psANN", "vANN"):
        assert count_parameters(build(kind, (8, 7), S, D, 99, C, layers=2, seed=0)) == trainable(
            kind, 56, S, D, 99, C, 2, 1
        )


def test_more_dendrites_than_pixels_for_global_fields() -> None:
    with pytest.raises(ValueError, match=r"Expected dendrites <= 12, .* got 13"):
        build("dANN-GRF", (8, 7), 12, 13, 4, C, layers=2)


def test_only_modules_have_parameters_to_count() -> None:
    assert count_parameters(nn.LeakyReLU()) == count_dense_parameters(nn.LeakyReLU()) == 0
