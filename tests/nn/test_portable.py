"""`interop.portable`: a model without our operators, for other compilers and runtimes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels.interop import portable
from tests import oracle
from tests.networks import NETWORKS


def layer(**options: Any) -> dk.DendriticLayer:
    return dk.DendriticLayer(dk.connectivity.random(20, 4, 3, 6, seed=0), **options)


def fields(*shape: int, channels: int = 1, first: bool = False) -> dk.Connectivity:
    return dk.connectivity.local_receptive_fields(
        shape, 2, 2, 4, channels=channels, channels_first=first, seed=0
    )


def agree(a: Any, b: Any, x: torch.Tensor) -> None:
    assert a(x).shape == b(x).shape
    assert oracle.relative_error(a(x), b(x)) < 1e-6


# A copy


def test_nothing_is_shared_with_the_model() -> None:
    model = nn.Sequential(layer(), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x, calls = torch.randn(5, 20), []
    y = model(x)
    model[1].register_forward_hook(lambda *_: calls.append("model"))
    plain: Any = portable(model)
    plain[1].register_forward_hook(lambda *_: calls.append("copy"))
    model(x)
    assert calls == ["model"]
    plain(x)
    assert calls == ["model", "model", "copy"]  # hooks of other modules come along
    plain.double()
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.detach().zero_()
    assert torch.equal(model(x), y)


def test_modes_and_frozen_parameters_stay() -> None:
    model: Any = nn.Sequential(layer(), nn.Linear(4, 2))
    model[0].requires_grad_(False).eval()
    plain: Any = portable(model)
    assert not any(p.requires_grad for p in plain[0].parameters())
    assert all(p.requires_grad for p in plain[1].parameters())
    assert [m.training for m in plain] == [False, True]
    model[0].synapse_weight.requires_grad_(True)
    assert [p.requires_grad for p in portable(model[0]).parameters()].count(True) == 1


class Listed(nn.Module):
    """The same modules by name, in a list and as a pair that is no ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.a = dk.SparseLinear(dk.connectivity.random(8, 4, 2, 4, seed=0))
        self.b = nn.Sequential(self.a)
        self.functions = [self.a, torch.relu, (self.b, self.a)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x
        for function in self.functions[:2]:
            y = function(y)  # type: ignore[operator]
        return y


def test_a_layer_in_several_places_is_one() -> None:
    model = Listed()
    plain = portable(model)
    copied: Any = plain
    assert copied.a is copied.b[0] is copied.functions[0] is copied.functions[2][1]
    assert copied.functions[2][0] is copied.b
    assert not any(isinstance(m, dk.SparseLinear) for m in plain.modules())
    agree(plain, model, torch.randn(3, 8))
    twice = dk.DendriticLayer(dk.connectivity.random(4, 4, 2, 3, seed=0))
    again: Any = portable(nn.Sequential(twice, nn.ReLU(), twice))
    assert again[0] is again[2]


def hooked(kind: str) -> nn.Module:
    made = layer()
    getattr(made, f"register_{kind}_hook")(lambda *_: None)
    return made


class Doubled(dk.DendriticLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(dk.DendriticLayer):
    """No forward of its own."""


def test_what_would_be_lost_is_refused() -> None:
    c = dk.connectivity.random(20, 4, 3, 6, seed=0)
    patched = layer()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for module, message in (
        (hooked("forward"), "without hooks, got DendriticLayer '0'"),
        (hooked("forward_pre"), "without hooks"),
        (hooked("full_backward"), "without hooks"),
        (hooked("state_dict_post"), "without hooks"),
        (hooked("state_dict_pre"), "without hooks"),
        (hooked("load_state_dict_pre"), "without hooks"),
        (hooked("load_state_dict_post"), "without hooks"),
        (Doubled(c), "without a forward of their own, got Doubled '0'"),
        (patched, "without a forward of their own"),
    ):
        with pytest.raises(ValueError, match=f"Expected layers {message}"):
            portable(nn.Sequential(module))
    named = Named(c)
    agree(portable(named), named, torch.randn(2, 20))


@pytest.mark.parametrize("kind", [dk.DendriticLayer, dk.SparseLinear])
def test_weights_that_hooks_or_parametrizations_compute(kind: Any) -> None:
    c, x = dk.connectivity.random(20, 4, 3, 6, seed=0), torch.randn(5, 20)
    pruned = kind(c)
    prune.l1_unstructured(pruned, kind.WEIGHT, 0.5)
    parametrized, normalised = kind(c), parametrizations.weight_norm(kind(c), kind.WEIGHT)
    signs = dk.Signed(torch.ones(c.nnz))
    parametrize.register_parametrization(parametrized, kind.WEIGHT, signs)
    for model in (pruned, parametrized, normalised):
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        agree(portable(model), model, x)  # before a forward brings the pruned weight up to date


# Inputs


IMAGES = {
    "no image": (dk.connectivity.random(36, 4, 2, 4, seed=0), [(36,), (2, 36), (2, 3, 36)]),
    "grey": (fields(4, 9), [(36,), (2, 36), (4, 9), (2, 4, 9), (2, 1, 4, 9), (2, 3, 4, 9)]),
    "channels last": (fields(3, 4, channels=3), [(2, 36), (2, 3, 4, 3), (5, 2, 3, 4, 3)]),
    "channels first": (fields(3, 4, channels=3, first=True), [(2, 36), (2, 3, 3, 4)]),
}


@pytest.mark.parametrize("kind", [dk.DendriticLayer, dk.SparseLinear])
@pytest.mark.parametrize("name", IMAGES)
def test_inputs_are_those_of_the_layer(name: str, kind: Any) -> None:
    c, shapes = IMAGES[name]
    model = kind(c)
    plain = portable(model)
    programs = [plain, torch.fx.symbolic_trace(plain), torch.jit.script(plain)]
    for shape in shapes:
        x = torch.randn(shape)
        traced = torch.jit.trace(plain, x)
        exported = torch.export.export(plain, (x,)).module()
        for program in (*programs, traced, exported):
            agree(program, model, x)


@pytest.mark.parametrize("name", IMAGES)
def test_other_widths_are_refused_by_every_program(name: str) -> None:
    c, _ = IMAGES[name]
    plain = portable(dk.DendriticLayer(c))
    with pytest.raises(ValueError, match=r"Expected x of shape \[\.\.\., 36\].*, got \[2, 40\]"):
        plain(torch.randn(2, 40))
    with pytest.raises(ValueError, match=r"Expected x of shape .*, got \[\]"):
        plain(torch.tensor(1.0))
    with pytest.raises(torch.jit.Error, match=r"Expected x of shape"):
        torch.jit.script(plain)(torch.tensor(1.0))
    x = torch.randn(2, 36)
    for program in (
        torch.fx.symbolic_trace(plain),
        torch.jit.script(plain),
        torch.jit.trace(plain, x),
        torch.export.export(plain, (x,)).module(),
    ):
        for width in (35, 40, 72):
            with pytest.raises(Exception, match=r"36|Expected"):
                program(torch.randn(2, width))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("kind", [dk.DendriticLayer, dk.SparseLinear])
def test_dtypes_are_those_of_the_layer(name: str, kind: Any) -> None:
    layer = kind(IMAGES[name][0])
    plain = portable(layer)
    scripted = torch.jit.script(plain)
    x = torch.randint(9, (2, 36))
    for program in (layer, plain, scripted):
        for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
            for autocast in (True, False):
                with (
                    torch.autocast("cpu", enabled=autocast),
                    pytest.raises(Exception, match=r"Expected .* of dtype"),
                ):
                    program(x.to(dtype))
        program(x.float())
    for low in (torch.bfloat16, torch.float16):
        for program in (layer, plain):
            with pytest.raises(TypeError, match=r"Expected .* of dtype"):
                program(x.to(low))
        for program in (plain, scripted):
            with torch.autocast("cpu"):
                assert oracle.relative_error(program(x.to(low)), layer(x.to(low)).float()) < 1e-2
    agree(portable(layer.double()), layer, x.double())


# TorchScript and ONNX


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "tanh", "identity", "gelu", "elu"])
@pytest.mark.parametrize("network", ["ragged", "constant fan-in", "dense"])
def test_script(network: str, activation: Any) -> None:
    c = dk.connectivity.all_to_all(7, 3, 2) if network == "dense" else NETWORKS[network]()
    model = nn.Sequential(
        dk.DendriticLayer(c, activation=activation, soma_activation="sigmoid"),
        dk.DendriticLayer(dk.connectivity.random(c.num_somas, 3, 2, 1, seed=0), bias=False),
        dk.SparseLinear(dk.connectivity.random(3, 2, 2, 2, seed=0)),
    )
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(portable(model)), file)
    file.seek(0)
    agree(torch.jit.load(file), model, torch.randn(5, c.in_features))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("shape", [(4, 36), (4, 1, 4, 9), (4, 4, 9)])
def test_onnx_of_images(shape: tuple[int, ...], dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = dk.DendriticLayer(fields(4, 9)).eval()
    dynamic: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    )
    path = tmp_path / "model.onnx"
    torch.onnx.export(portable(model), (torch.randn(shape),), path, dynamo=dynamo, **dynamic)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for samples in (1, 2, 33):
        x = torch.randn(samples, *shape[1:])
        (y,) = session.run(None, {name: x.numpy()})
        assert y.shape == model(x).shape
        assert oracle.relative_error(torch.from_numpy(y), model(x)) < 1e-5
    with pytest.raises(Exception, match=r"(?i)invalid|dimension|shape"):
        session.run(None, {name: torch.randn(2, *shape[1:-1], shape[-1] + 1).numpy()})
