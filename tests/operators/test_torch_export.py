"""torch.export and AOTInductor: programs that hold their connections as constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from tests import oracle
from tests.networks import NETWORKS

BATCHES = [1, 2, 31, 33, 100]


def network() -> nn.Sequential:
    first = dk.connectivity.random(30, 10, 4, 6, seed=0)
    second = dk.connectivity.random(10, 5, 3, 4, constant_fan_in=True, seed=0)
    return nn.Sequential(dk.DendriticLayer(first), dk.SparseLinear(second), nn.Linear(15, 3))


def export(model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    x = torch.randn(8, 30)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)


def check(program: nn.Module, model: nn.Module) -> None:
    for batch in BATCHES:
        x = torch.randn(batch, 30)
        assert oracle.relative_error(program(x), model(x)) < 1e-6


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_export(backend: str, strict: bool, grad: bool, tmp_path: Path) -> None:
    model = network()
    with torch.set_grad_enabled(grad):
        program = export(model, strict)
    called = [node.target for node in program.graph.nodes]
    assert called.count(torch.ops.dendrite_kernels.forward.default) == 2
    check(program.module(), model)
    torch.export.save(program, tmp_path / "program.pt2")
    check(torch.export.load(tmp_path / "program.pt2").module(), model)
    check(program.run_decompositions().module(), model)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_an_exported_program_trains(backend: str, strict: bool) -> None:
    model = network()
    program = export(model, strict).module()
    x = torch.randn(8, 30)
    program(x).square().sum().backward()
    model(x).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in program.named_parameters():
        assert parameter.grad is not None
        assert expected[name].grad is not None
        assert oracle.relative_error(parameter.grad, expected[name].grad) < 1e-6  # type: ignore[arg-type]


def test_a_program_exported_without_gradients_trains(backend: str) -> None:
    """The operator itself sees that gradients are needed, whatever was traced."""
    model = network()
    with torch.no_grad():
        program: Any = export(model, strict=False).module()
    x = torch.randn(8, 30)
    program(x).sum().backward()
    model(x).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in program.named_parameters():
        assert oracle.relative_error(parameter.grad, expected[name].grad) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_other_activations_export(backend: str, activation: str) -> None:
    layer = dk.DendriticLayer(NETWORKS["ragged"](), activation=activation)
    x = torch.randn(8, 61)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(33, 61)
    assert oracle.relative_error(program.module()(x), layer(x)) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_aot_inductor(backend: str, tmp_path: Path) -> None:
    """The package calls the operators through the dispatcher: it serves in a Python process that
    has imported dendrite_kernels. For one without Python, package interop.portable(model)."""
    if backend == "reference":
        pytest.skip("nobody packages the reference backend")
    for name, model in [("kernels", network()), ("portable", dk.interop.portable(network()))]:
        with torch.no_grad():
            program = export(model, strict=False)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / f"{name}.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for batch in BATCHES[1:]:
            x = torch.randn(batch, 30)
            assert oracle.relative_error(package(x), model(x)) < 1e-6
