"""`interop.convert`: a whole model, its pruned and masked layers made sparse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dendrite_kernels as dk
from dendrite_kernels._trial import check_linear
from dendrite_kernels.interop import convert
from tests import oracle

N, R, S = 20, 12, 4


class MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class PlainMasked(nn.Module):
    """Masked in place, as in the training loops that zero the weights; not an nn.Linear."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * mask)
        self.register_parameter("bias", None)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def synapses() -> Tensor:
    return torch.rand(R, N, generator=torch.Generator().manual_seed(0)) < 0.3


def cable() -> Tensor:
    """[S, R]; dendrites are not in the order of their somas."""
    return torch.arange(R) % S == torch.arange(S)[:, None]


def pruned(linear: nn.Linear, mask: Tensor) -> nn.Linear:
    prune.custom_from_mask(linear, "weight", mask)
    return linear


def network(form: str) -> nn.Sequential:
    """Dendrites, somas, a dense output; one object is both activations."""
    act = nn.ReLU() if form == "relu" else nn.LeakyReLU(0.2, inplace=True)
    if form == "pruned":
        dendrite = pruned(nn.Linear(N, R), synapses())
        soma = pruned(nn.Linear(R, S), cable())
    else:
        dendrite = MaskedLinear(N, R, synapses())
        soma = MaskedLinear(R, S, cable().float())
    return nn.Sequential(nn.Flatten(), dendrite, act, soma, act, nn.Linear(S, 3))


def agree(a: nn.Module, b: nn.Module, features: int = N) -> bool:
    x = torch.randn(5, features)
    return oracle.relative_error(a(x), b(x)) < 1e-6


@pytest.mark.parametrize("form", ["pruned", "masked", "relu"])
def test_pairs_become_dendritic_layers(backend: str, form: str) -> None:
    model = network(form)
    model(torch.randn(3, N)).sum().backward()
    before = copy.deepcopy(dict(model.state_dict()))
    converted, report = convert(model)
    assert agree(converted, model)
    layer: Any = converted.get_submodule("1")
    assert type(layer) is dk.DendriticLayer
    assert layer.connectivity.nnz == synapses().sum()
    assert layer.activation == ("relu" if form == "relu" else "leaky_relu")
    assert form == "relu" or layer.negative_slope == 0.2
    assert [type(m).__name__ for m in converted.children()] == [
        "Flatten", "DendriticLayer", "Identity", "Identity", "Identity", "Linear",
    ]  # fmt: skip
    assert report.converted["1"] == "DendriticLayer"
    assert report.converted["4"] == "Identity, in the layer at 1"
    assert list(report.left) == ["5"]
    assert report.left["5"].startswith("it is dense")
    assert report.parameters_before == N * R + R + R * S + S + S * 3 + 3
    assert report.parameters_after == int(synapses().sum()) + R + R + S + S * 3 + 3
    assert f"{report.parameters_before} -> {report.parameters_after} parameters" in str(report)
    assert "5: left, it is dense" in str(report)
    after = model.state_dict()  # the model is as it was
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for p in converted.parameters():
        nn.init.zeros_(p)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_copy_trains_as_the_model(backend: str) -> None:
    model = network("masked")
    converted, _ = convert(model)
    x = torch.randn(16, N)
    for _ in range(3):
        for each in (model, converted):
            each.zero_grad()
            each(x).square().mean().backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
    assert agree(model, converted)


def test_files_take_the_copy(tmp_path: Any) -> None:
    converted, _ = convert(network("pruned"))
    dk.save(converted, tmp_path / "model")
    assert agree(dk.load(tmp_path / "model"), converted)


@pytest.mark.parametrize(
    "kind", ["several somas", "two slopes", "tanh", "one bias", "subclass", "hook", "state hook"]
)
def test_what_is_no_pair_becomes_sparse_linear_layers(kind: str) -> None:
    owners = cable()
    if kind == "several somas":
        owners[:, 0] = True
    first = MaskedLinear(N, R, synapses())
    second = MaskedLinear(R, S, owners, bias=kind != "one bias")
    act: nn.Module = nn.Tanh() if kind == "tanh" else nn.LeakyReLU(0.1)
    if kind == "hook":
        act.register_forward_hook(lambda *_: None)
    if kind == "state hook":
        act.register_state_dict_post_hook(lambda *_: None)
    other = nn.LeakyReLU(0.2) if kind == "two slopes" else act
    sequential = type("Other", (nn.Sequential,), {}) if kind == "subclass" else nn.Sequential
    model = sequential(first, act, second, other)
    converted, report = convert(model)
    assert report.converted == {"0": "SparseLinear", "2": "SparseLinear"}
    assert agree(converted, model)


def test_pairs_in_a_row() -> None:
    """The second layer is no cable of the first, but has one of its own."""
    act = nn.LeakyReLU(0.1)
    wide = MaskedLinear(N, N, torch.ones(N, N))
    layers = [wide, act, MaskedLinear(N, R, synapses()), act, MaskedLinear(R, S, cable()), act]
    model = nn.Sequential(*layers, MaskedLinear(S, 3, torch.ones(3, S)))
    converted, report = convert(model)
    kinds = [report.converted[key].partition(",")[0] for key in "0246"]
    assert kinds == ["SparseLinear", "DendriticLayer", "Identity", "SparseLinear"]
    assert agree(converted, model)


def test_one_layer_is_a_model() -> None:
    for layer in (MaskedLinear(N, R, synapses()), PlainMasked(N, R, synapses().float())):
        converted, report = convert(layer)
        assert report.converted == {"": "SparseLinear"}
        assert type(converted) is dk.SparseLinear
        assert agree(converted, layer)


def test_our_own_pruned_layers() -> None:
    layer: Any = dk.DendriticLayer(dk.connectivity.random(N, S, 3, 8, seed=0))
    prune.l1_unstructured(layer, "synapse_weight", 0.5)
    other = dk.SparseLinear(dk.connectivity.random(S, S, 1, 2, seed=0))
    prune.l1_unstructured(other, "bias", 0.5)
    model = nn.Sequential(layer, other, dk.DendriticLayer(dk.connectivity.random(S, 2, 1, 2)))
    converted, report = convert(model)
    assert report.converted == {"0": "DendriticLayer"}
    assert report.left == {"1": "its synapses are not pruned"}
    assert layer.connectivity.nnz // 2 == converted.get_submodule("0").connectivity.nnz  # type: ignore[union-attr]
    assert agree(converted, model)


def test_modes_and_frozen_parameters_stay() -> None:
    model = network("masked").eval()
    model[1].requires_grad_(False)
    layer: Any = convert(model)[0].get_submodule("1")
    assert not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "cable_weight", "soma_bias",
    }  # fmt: skip


# What stays, and why


class Root(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.children()], -1)


def masked() -> MaskedLinear:
    return MaskedLinear(N, R, synapses())


def hooked(where: str) -> nn.Module:
    layer = masked()
    if where == "forward":
        layer.register_forward_hook(lambda *_: None)
    elif where == "before":
        layer.register_forward_pre_hook(lambda *_: None)
    elif where == "backward":
        layer.register_full_backward_hook(lambda *_: None)
    elif where == "state":
        layer.register_state_dict_post_hook(lambda *_: None)
    elif where == "tensor":
        layer.weight.register_hook(lambda _: None)
    else:
        dk.optim.StepInBackward(layer.parameters(), lambda p: torch.optim.SGD(p, lr=0.1))
    return layer


def wrong_mask(mask: Tensor) -> nn.Module:
    layer = masked()
    layer.mask = mask
    return layer


class Renamed(nn.Linear):
    """No forward of its own."""


def unused_mask(linear: nn.Linear) -> nn.Linear:
    linear.register_buffer("mask", synapses())
    return linear


class Inverse(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1 - self.mask.float()), self.bias)


class Noisy(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Clamped(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-6, 6))


class Dropping(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Batched(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) < 10 else super().forward(x - x.mean(0))


class Single(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(0)


class Silent(MaskedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x != 0).any()


class Scaled(MaskedLinear):
    def __init__(self) -> None:
        super().__init__(N, R, synapses())
        self.scale = nn.Parameter(torch.ones(R))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class TwoInputs(MaskedLinear):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise RuntimeError("two inputs")
        return super().forward(x) + super().forward(y)


def bias_pruned() -> nn.Linear:
    linear = nn.Linear(N, R)
    prune.random_unstructured(linear, "bias", 0.5)
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(N, R), "it is dense: its weight has no mask and is not pruned"),
        (bias_pruned(), "it is dense: its weight has no mask and is not pruned"),
        (hooked("forward"), "it has hooks"),
        (hooked("before"), "it has hooks"),
        (hooked("backward"), "it has hooks"),
        (hooked("state"), "it has hooks"),
        (hooked("tensor"), "its parameters have hooks"),
        (hooked("step"), "its parameters have hooks"),
        (parametrizations.weight_norm(masked()), "it is parametrized"),
        (wrong_mask(torch.full((R, N), 0.5)), "Expected mask of values 0 and 1, got 0.5"),
        (wrong_mask(synapses().T), "give mask.T, for Keras has"),
        (Inverse(N, R, synapses()), "got other sums"),
        (Noisy(N, R, synapses()), "got other sums"),
        (Clamped(N, R, synapses()), "got other sums"),
        (Dropping(N, R, synapses()).eval(), "got other sums"),
        (Batched(N, R, synapses()), "got other sums"),
        (Single(N, R, synapses()), "Expected Single to give [1, 12], got another output"),
        (Silent(N, R, synapses()), "got other sums"),
        (TwoInputs(N, R, synapses()), "take inputs [B, 20]: RuntimeError('two inputs')"),
        (Scaled(), "Expected parameters weight and bias, got ['bias', 'scale', 'weight']"),
        (masked().to("meta"), "Expected weight to be a dense tensor with values, got a meta one"),
        (wrong_mask(synapses().to_sparse()), "Expected mask to be a dense tensor with values"),
        (wrong_mask(synapses().to_sparse_csr()), "Expected mask to be a dense tensor with values"),
        (unused_mask(nn.Linear(N, R)), "got Linear with others, whose forward does not use"),
        (unused_mask(Renamed(N, R)), "got Renamed with others, whose forward does not use"),
        (unused_mask(pruned(nn.Linear(N, R), ~synapses())), "got Linear with others"),
    ],
)
def test_reasons(module: nn.Module, reason: str) -> None:
    converted, report = convert(Root(a=module, b=masked()))
    assert reason in report.left["a"]
    assert report.converted == {"b": "SparseLinear"}
    assert type(converted.get_submodule("a")) is type(module)


def test_a_trial_leaves_no_trace() -> None:
    for training in (True, False):
        module = Dropping(N, R, synapses()).train(training)
        generator = torch.get_rng_state()
        with pytest.raises(ValueError, match="got other sums"):
            check_linear(module, module, synapses())
        assert torch.equal(torch.get_rng_state(), generator)
        assert module.training == training


def test_shared_modules_and_parameters_stay() -> None:
    one, other, alone = masked(), masked(), masked()
    other.bias = one.bias
    twice = masked()
    model = Root(one=one, other=other, twice=twice, again=twice, alone=alone)
    converted, report = convert(model)
    assert report.left["one"] == "it shares a parameter: one.bias, other.bias"
    assert report.left["twice"] == "it is shared: twice, again"
    assert report.converted == {"alone": "SparseLinear"}
    copied: Any = converted
    assert copied.twice is copied.again
    assert copied.twice is not twice
    assert copied.one.bias is copied.other.bias
    assert agree(converted, model)


def test_weights_that_torch_reads_itself_stay() -> None:
    encoder = nn.TransformerEncoderLayer(N, 4, 16, batch_first=True)
    prune.random_unstructured(encoder.linear1, "weight", 0.5)
    prune.random_unstructured(encoder.self_attn.out_proj, "weight", 0.5)
    converted, report = convert(encoder.eval())
    assert not report.converted
    assert report.left["linear1"] == "TransformerEncoderLayer reads its weight"
    assert report.left["self_attn.out_proj"] == "MultiheadAttention reads its weight"
    x = torch.randn(2, 3, N)
    assert torch.equal(converted(x), encoder(x))


def test_masks_that_the_weights_already_have() -> None:
    linear = unused_mask(nn.Linear(N, R))
    with torch.no_grad():
        linear.weight *= synapses()
    converted, report = convert(linear)
    assert report.converted == {"": "SparseLinear"}
    assert agree(converted, linear)


def test_scripted_modules_stay() -> None:
    x = torch.randn(2, N)
    first, second = torch.jit.trace(masked(), x), torch.jit.trace(nn.Linear(N, N), x)  # type: ignore[no-untyped-call]
    model = Root(a=first, b=second, c=masked())
    converted, report = convert(model)
    assert report.left == {"a": "TorchScript has compiled it: convert first"}
    assert report.converted == {"c": "SparseLinear"}
    assert agree(converted, model)


def test_lazy_modules_are_refused() -> None:
    for model in (nn.LazyLinear(3), Root(a=masked(), b=nn.LazyLinear(3))):
        with pytest.raises(ValueError, match=r"Expected parameters with shapes, got a lazy .*weig"):
            convert(model)


def test_only_subclasses_of_sequential_keep_what_is_inside() -> None:
    class Body(nn.Sequential):
        pass

    act = nn.LeakyReLU(0.1)
    layers = MaskedLinear(N, R, synapses()), act, MaskedLinear(R, S, cable()), act
    whole: Any = convert(nn.Sequential(*layers))[0]
    assert [type(m) for m in whole[1:]] == [nn.Identity] * 3
    for end in range(1, 5):
        assert agree(convert(Body(*layers))[0][:end], nn.Sequential(*layers)[:end])  # type: ignore[index]


def test_other_pruned_modules_stay_pruned() -> None:
    conv = nn.Conv2d(1, 2, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    converted, report = convert(nn.Sequential(conv, pruned(nn.Linear(5, 5), torch.eye(5))))
    assert report.left == {"0": "only linear layers are converted, not Conv2d"}
    x = torch.randn(1, 1, 7, 7)
    assert torch.equal(converted.get_submodule("0")(x), conv(x))
    assert torch.equal(converted.get_submodule("0").get_buffer("weight_mask"), conv.weight_mask)


def test_lists_of_modules_find_the_copies() -> None:
    """Python attributes that hold a module must not keep the old one."""
    model: Any = Root(a=masked(), b=nn.Linear(N, 2))
    model.order = [model.b, model.a]
    converted: Any = convert(model)[0]
    assert converted.order[1] is converted.a
    assert type(converted.a) is dk.SparseLinear
    assert converted.order[0] is converted.b
    assert converted.b is not model.b
