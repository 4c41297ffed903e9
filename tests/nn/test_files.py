"""Whole networks in one file, rebuilt without the seed; nothing else is ever built from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dendrite_kernels as dk
from dendrite_kernels import files
from tests.nn.test_nn import assert_same, network, uneven


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in model.named_modules(remove_duplicate=False)}


def round_trip(model: nn.Module, path: Path) -> nn.Module:
    dk.save(model, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    before = torch.get_rng_state()
    back = dk.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(back) == repr(model)
    assert_same(back, model)
    assert modes(back) == modes(model)
    return back


@pytest.mark.parametrize("kind", dk.models._KINDS)
@pytest.mark.parametrize("channels_first", [False, True])
def test_networks_of_the_paper(kind: str, channels_first: bool, tmp_path: Path) -> None:
    model = dk.models.build(
        kind, (6, 5), 6, 3, 5, 3, channels=3, channels_first=channels_first, layers=2, seed=0
    )
    x = torch.randn(4, 90)
    assert torch.equal(round_trip(model, tmp_path / "model")(x), model(x))


def test_layers_options_and_structure(tmp_path: Path) -> None:
    fields = dk.connectivity.local_receptive_fields((6, 5), 4, 3, 5, seed=0)
    layer = dk.DendriticLayer(
        fields, bias=False, activation="tanh", init="paper", precision="bf16", dtype=torch.float64
    )
    back: Any = round_trip(layer, tmp_path / "layer")
    assert back.connectivity == fields
    assert back.connectivity.plot([0]).axes
    linear = dk.SparseLinear(uneven(), negative_slope=0.3)
    linear.weight.requires_grad_(False)
    back = round_trip(linear.eval(), tmp_path / "layer")
    assert not back.weight.requires_grad
    assert back.bias.requires_grad
    assert back.negative_slope == 0.3


def test_a_sequential_of_all_that_a_file_may_hold(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(30, 30, bias=False), nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU(0.5),
        nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(2), nn.Dropout(0.25),
        nn.Identity(), nn.Sequential(dk.DendriticLayer(network()), nn.Sequential()),
        nn.Softmax(-1), nn.LogSoftmax(1),
    )  # fmt: skip
    x = torch.randn(3, 5, 6)
    assert torch.equal(round_trip(model.eval(), tmp_path / "model")(x), model(x))


def test_modules_used_again(tmp_path: Path) -> None:
    act, pair = nn.ReLU(), nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    model = nn.Sequential(
        dk.DendriticLayer(network()), nn.Linear(10, 10), act, pair, nn.Linear(10, 10), pair, act
    ).eval()
    back, x = round_trip(model, tmp_path / "model"), torch.randn(3, 30)
    assert isinstance(back, nn.Sequential)
    assert len(back) == 7
    assert back[2] is back[6]
    assert torch.equal(back(x), model(x))


def test_each_module_keeps_its_mode(tmp_path: Path) -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Dropout(), nn.Sequential(dk.SparseLinear(network()), act), act)
    model[1].eval()
    round_trip(model, tmp_path / "model")
    model.eval()
    model[0].train()
    round_trip(model, tmp_path / "model")


def patch_forward(module: nn.Module) -> None:
    module.forward = lambda x: x  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward_hooks": lambda m: m.register_forward_hook(lambda *_: None),
    "forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward_hooks": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward_pre_hooks": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state_dict_hooks": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "state_dict_pre_hooks": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_pre_hooks": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_post_hooks": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
    "forward": patch_forward,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("place", ["", "0", "1", "1.0"])
def test_what_a_file_would_lose_is_refused(name: str, place: str, tmp_path: Path) -> None:
    model = nn.Sequential(dk.SparseLinear(network()), nn.Sequential(nn.ReLU()))
    CHANGES[name](model.get_submodule(place))
    where = f"model.{place}" if place else "model"
    with pytest.raises(ValueError, match=rf"got {name} at {re.escape(where)}: remove them"):
        dk.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dk.SparseLinear(network())
    with pytest.raises(FileNotFoundError, match=r"missing/model'$"):
        dk.save(layer, tmp_path / "missing" / "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder'$"):
        dk.save(layer, tmp_path / "folder")

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"Expected to write .*model, got No space left"):
        dk.save(layer, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_devices(tmp_path: Path) -> None:
    """An error of the device does not blame the file."""
    path = tmp_path / "model"
    dk.save(dk.SparseLinear(network()), path)
    assert next(dk.load(path, device="meta").parameters()).is_meta
    with pytest.raises(RuntimeError, match="Expected one of cpu, cuda"):
        dk.load(path, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            dk.load(path, device="cuda")


OPTIONS = {
    nn.LeakyReLU: "negative_slope", nn.Softmax: "dim", nn.LogSoftmax: "dim",
    nn.Flatten: "start_dim", nn.Dropout: "p", nn.ELU: "alpha", nn.GELU: "approximate",
    nn.Softplus: "beta", nn.ReLU: "inplace", dk.SparseLinear: "negative_slope",
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("value", ["a", [1], {}])
def test_options_of_wrong_types(kind: Any, value: Any, tmp_path: Path) -> None:
    """Refused at load, not in forward."""
    path = tmp_path / "model"
    module = kind(network()) if kind is dk.SparseLinear else kind()
    dk.save(module, path)
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["dendrite_kernels"])
    described["model"][OPTIONS[kind]] = value
    state = module.state_dict()
    save_file(state, path, metadata={"dendrite_kernels": json.dumps(described)})
    with pytest.raises(ValueError, match=r"Expected a file written by .*Expected .* got"):
        dk.load(path)


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    layer = dk.DendriticLayer(network())
    dk.save(layer, tmp_path / "layer.safetensors")
    twin = dk.DendriticLayer(network())
    twin.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same(twin, layer)


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "model"
    layer = dk.SparseLinear(network())
    with pytest.raises(TypeError, match=r"got BatchNorm1d at model\.1\.0: save its state_dict"):
        dk.save(nn.Sequential(layer, nn.Sequential(nn.BatchNorm1d(3))), path)
    with pytest.raises(ValueError, match=r"shared parameters, got 0\.weight and 1\.weight"):
        dk.save(nn.Sequential(layer, layer), path)
    with pytest.raises(TypeError, match="got Own"):
        dk.save(type("Own", (dk.SparseLinear,), {})(network()), path)
    with pytest.raises(ValueError, match="their types make them, got forward_pre_hooks at model:"):
        dk.save(prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), path)
    gap = nn.Sequential(layer)
    gap.register_module("gap", None)
    with pytest.raises(TypeError, match=r"got NoneType at model\.gap"):
        dk.save(gap, path)
    assert not list(tmp_path.iterdir())


def changed(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    "module",
    [
        changed(nn.Linear(3, 2), "in_features", 4),
        changed(nn.Linear(3, 2), "in_features", -3),
        changed(nn.Linear(3, 2), "weight", nn.Parameter(torch.zeros(2, 4))),
        changed(nn.Linear(3, 2), "bias", nn.Parameter(torch.zeros(3))),
        changed(nn.Linear(3, 2), "more", nn.Parameter(torch.zeros(3))),
        changed(dk.SparseLinear(network()), "connectivity", uneven()),
        changed(dk.SparseLinear(network()), "bias", nn.Parameter(torch.zeros(3))),
        changed(dk.DendriticLayer(network()), "activation", "rellu"),
        changed(nn.Dropout(), "p", 2),
        changed(nn.Identity(), "more", nn.Dropout().eval()),
    ],
)
def test_what_load_would_refuse_is_not_saved(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="options and parameters of their types, got other ones"):
        dk.save(nn.Sequential(module), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_parameters_without_values_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with values, got 0\.weight on the meta device"):
        dk.save(nn.Sequential(nn.Linear(3, 2, device="meta")), tmp_path / "model")
    flat, linear = torch.zeros(8), nn.Linear(2, 2)
    linear.weight, linear.bias = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[3:5])
    with pytest.raises(ValueError, match="Expected parameters that share no memory, got"):
        dk.save(linear, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    linear.bias = nn.Parameter(flat[4:6])  # views side by side are as good as tensors of their own
    round_trip(linear, tmp_path / "model")


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    layer: Any = changed(dk.DendriticLayer(network()), "negative_slope", np.float32(0.25))
    assert round_trip(layer, tmp_path / "model").negative_slope == 0.25


def test_a_loaded_model_does_not_live_in_its_file(tmp_path: Path) -> None:
    path, layer = tmp_path / "model", dk.SparseLinear(network())
    dk.save(layer, path)
    back = dk.load(path)
    with open(path, "r+b") as file:  # in place, as cp does
        file.write(bytes(path.stat().st_size))
    assert_same(back, layer)


def test_a_model_that_steps_in_backward_is_saved(tmp_path: Path) -> None:
    """Hooks of parameters stay behind: what was trained can be used and trained elsewhere."""
    model = nn.Sequential(dk.DendriticLayer(network()), nn.Linear(10, 2))
    dk.optim.StepInBackward(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1))
    model(torch.randn(3, 30)).sum().backward()
    back = round_trip(model, tmp_path / "model")
    back(torch.randn(3, 30)).sum().backward()
    assert all(p.grad is not None for p in back.parameters())


def test_layers_that_were_normalised_are_saved(tmp_path: Path) -> None:
    """weight_norm leaves a hook behind."""
    linear = parametrizations.weight_norm(nn.Linear(3, 2))
    parametrize.remove_parametrizations(linear, "weight")
    round_trip(linear, tmp_path / "model")


def test_parameters_of_several_dtypes(tmp_path: Path) -> None:
    linear = nn.Linear(3, 2)
    linear.bias.data = linear.bias.data.double()
    round_trip(linear, tmp_path / "model")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    dk.save(dk.SparseLinear(network()), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        dk.save(nn.BatchNorm1d(3), path)
    assert path.read_bytes() == before


def header(model: dict[str, Any], **others: Any) -> str:
    return json.dumps({"version": 2, "evaluating": [], "frozen": [], "model": model} | others)


LINEAR = {"type": "Linear", "in_features": 3, "out_features": 2}
NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "3",
        NESTED,
        header(LINEAR, version=1),
        header({"type": "BatchNorm1d"}),
        header({"type": "os.system"}),
        header(LINEAR | {"in_features": 4}),
        header(LINEAR | {"in_features": 2**62}),
        header(LINEAR | {"in_features": "a"}),
        header(LINEAR | {"device": "cpu"}),
        header({"type": "Sequential"}),
        header({"type": "Sequential", "children": [1]}),
        header({"type": "Sequential", "children": {"a.b": LINEAR}}),
        header({"type": "DendriticLayer"}),
        header(LINEAR, frozen=["x"]),
        header(LINEAR, frozen=3),
        header(LINEAR, evaluating=["x"]),
        header(LINEAR, evaluating=3),
        header(LINEAR | {"in_features": 3.0}),
        header({"type": "again", "module": ""}),
        header({"type": "Sequential", "children": {"": LINEAR}}),
        header({"type": "Sequential", "children": {"0": {"type": "again", "module": "0."}}}),
        json.dumps({"version": 2, "model": LINEAR}),
    ],
)
def test_hostile_headers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    save_file(state, path, metadata={"dendrite_kernels": text})
    with pytest.raises(ValueError, match=r"Expected a file written by dendrite_kernels\.save, got"):
        dk.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError):
        dk.load(path)
    dk.save(dk.SparseLinear(network()), path)
    whole = path.read_bytes()
    for damaged in (b"", b"abc", whole[:7], whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="Expected a file written by"):
            dk.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="Expected a file written by"):
        dk.load(path)
