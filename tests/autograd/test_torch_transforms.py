"""torch.func, forward mode and gradients of gradients, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests import oracle
from tests.networks import ragged

functional: Any = dk.functional
formula: Any = oracle

State = dict[str, torch.Tensor]
Network = Callable[[State, torch.Tensor], torch.Tensor]  # x [B, N] -> [B]

CONNECTIVITIES = {
    "constant fan-in": lambda: dk.connectivity.random(7, 3, 2, 4, constant_fan_in=True, seed=3),
    "ragged": lambda: ragged(7, 6, [0, 1, 1, 4, 6], seed=3),
}


class Case:
    """A layer, and the oracle as a function of the same state."""

    def __init__(self, kind: str, connections: str) -> None:
        self.c: Connectivity = CONNECTIVITIES[connections]()
        layer = dk.DendriticLayer if kind == "dendritic" else dk.SparseLinear
        self.module = layer(self.c, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_()
        self.state = {name: p.detach() for name, p in self.module.named_parameters()}
        self.x = torch.randn(5, 7, dtype=torch.float64)

    def ours(self, state: State, x: torch.Tensor) -> Any:
        return functional_call(self.module, state, (x,)).sin().sum(-1)

    def exact(self, state: State, x: torch.Tensor) -> Any:
        if isinstance(self.module, dk.DendriticLayer):
            names = ["synapse_weight", "dendrite_bias", "cable_weight", "soma_bias"]
            y = formula.dendritic_layer(x, *(state[n] for n in names), self.c, 0.1)
        else:
            y = formula.sparse_linear(x, state["weight"], state["bias"], self.c)
        return y.sin().sum(-1)


@pytest.fixture(params=["dendritic", "sparse"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=list(CONNECTIVITIES))
def case(request: pytest.FixtureRequest, kind: str) -> Case:
    return Case(kind, request.param)


def scalar(f: Network) -> Network:
    return lambda state, x: f(state, x).sum()


TRANSFORMS: dict[str, Callable[[Network, State, torch.Tensor], Any]] = {
    "grad": lambda f, s, x: grad(scalar(f), argnums=(0, 1))(s, x),
    "grad of x": lambda f, s, x: grad(scalar(f), argnums=1)(s, x),
    "vjp": lambda f, s, x: vjp(f, s, x)[1](torch.arange(5.0, dtype=torch.float64)),
    "jacrev": lambda f, s, x: jacrev(f, argnums=(0, 1))(s, x),
    "jacfwd": lambda f, s, x: jacfwd(f, argnums=(0, 1))(s, x),
    "jvp": lambda f, s, x: jvp(f, (s, x), ({k: v + 1 for k, v in s.items()}, x.cos())),
    "jvp of x": lambda f, s, x: jvp(lambda x: f(s, x), (x,), (x.cos(),)),
    "hessian": lambda f, s, x: hessian(scalar(f), argnums=(0, 1))(s, x),
    "jacrev of jacrev": lambda f, s, x: jacrev(jacrev(scalar(f)))(s, x),
    "jacfwd of jacfwd": lambda f, s, x: jacfwd(jacfwd(scalar(f)))(s, x),
    "gradients of gradients": lambda f, s, x: grad(
        lambda s, x: sum(
            g.square().sum() for g in tree_leaves(grad(scalar(f), argnums=(0, 1))(s, x))
        ),
        argnums=(0, 1),
    )(s, x),
    "third": lambda f, s, x: grad(
        lambda x: grad(lambda x: grad(lambda x: f(s, x).sum())(x).sum())(x).sum()
    )(x),
    "vmap": lambda f, s, x: vmap(lambda x: f(s, x))(torch.stack([x, x + 1, x - 1])),
    "vmap of the last": lambda f, s, x: vmap(lambda x: f(s, x), in_dims=2)(
        torch.stack([x, x + 1, x - 1], 2)
    ),
    "per-sample gradients": lambda f, s, x: vmap(
        grad(lambda s, x: f(s, x[None]).sum()), in_dims=(None, 0)
    )(s, x),
    "ensemble": lambda f, s, x: vmap(f, in_dims=(0, None))(
        {k: torch.stack([v, v + 1, -v]) for k, v in s.items()}, x
    ),
    "vmap of vmap": lambda f, s, x: vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(
        {k: torch.stack([v, -v]) for k, v in s.items()}, torch.stack([x, x + 1])
    ),
    "gradients of an ensemble": lambda f, s, x: vmap(grad(scalar(f)), in_dims=(0, None))(
        {k: torch.stack([v, v + 1]) for k, v in s.items()}, x
    ),
}


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_transforms_are_exact(
    backend: str, case: Case, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebuilt(*args: Any) -> Connectivity:
        raise AssertionError("a transform lost the Connectivity and built it again")

    run = TRANSFORMS[transform]
    if transform == "hessian" and isinstance(case.module, dk.SparseLinear):
        run = TRANSFORMS["jacrev of jacrev"]
    expected = tree_leaves(run(case.exact, case.state, case.x))
    monkeypatch.setattr(Connectivity, "from_csr", rebuilt)
    actual = tree_leaves(run(case.ours, case.state, case.x))
    assert max(oracle.errors(actual, expected)) < 1e-12


def leaves(case: Case) -> list[torch.Tensor]:
    return [t.clone().requires_grad_() for t in (case.x, *case.state.values())]


def function(case: Case) -> Callable[..., torch.Tensor]:
    if isinstance(case.module, dk.DendriticLayer):
        return lambda *t: functional.dendritic_layer(*t, case.c)
    return lambda *t: functional.sparse_linear(*t, case.c)


# "reference" is torch all the way, slow to check, and compared with the oracle above.
kernels = pytest.mark.parametrize("backend", ["cpp", "numba"], indirect=True)


@kernels
def test_gradgradcheck(backend: str, case: Case) -> None:
    assert torch.autograd.gradgradcheck(function(case), leaves(case))


@kernels
def test_gradgradcheck_without_gradient_of_x(backend: str, case: Case) -> None:
    x, *parameters = leaves(case)
    f = function(case)
    assert torch.autograd.gradgradcheck(lambda *p: f(x.detach(), *p), parameters)


def test_third_order(backend: str, case: Case) -> None:
    x = case.x.clone().requires_grad_()

    def third(f: Network) -> torch.Tensor:
        value = f(case.state, x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        return g

    assert oracle.relative_error(third(case.ours), third(case.exact)) < 1e-12


def test_recorded_gradients_equal_plain_ones(backend: str, case: Case) -> None:
    """create_graph=True takes another path to the same first-order numbers."""
    inputs = leaves(case)
    y = function(case)(*inputs).sin().sum()
    plain = torch.autograd.grad(y, inputs, retain_graph=True)
    recorded = torch.autograd.grad(y, inputs, create_graph=True)
    assert max(oracle.errors(recorded, plain)) < 1e-14


def test_gradient_penalty_trains(backend: str) -> None:
    """A loss on the gradient of x, through two layers and without biases."""
    c = dk.connectivity.random(7, 6, 2, 4, seed=3)
    layers = [dk.DendriticLayer(c, bias=False), dk.SparseLinear(CONNECTIVITIES["ragged"]())]
    model = torch.nn.Sequential(layers[0], torch.nn.Linear(6, 7), layers[1])
    x = torch.randn(5, 7, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    g.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model[0].parameters())


def test_forward_mode(backend: str, case: Case) -> None:
    tangent = case.x.cos()
    derivative: Any = jvp(lambda x: case.exact(case.state, x), (case.x,), (tangent,))
    expected = derivative[1]
    with forward_ad.dual_level():
        y = case.ours(case.state, forward_ad.make_dual(case.x, tangent))
        assert oracle.relative_error(forward_ad.unpack_dual(y).tangent, expected) < 1e-12
    f = function(case)
    assert torch.autograd.gradcheck(f, leaves(case), check_forward_ad=True, check_backward_ad=False)


def test_ensemble_of_modules(backend: str) -> None:
    c = CONNECTIVITIES["ragged"]()
    modules = [dk.DendriticLayer(c) for _ in range(3)]
    state, buffers = stack_module_state(modules)
    x = torch.randn(5, 7)
    y = vmap(lambda s, b: functional_call(modules[0], (s, b), (x,)))(state, buffers)
    assert oracle.relative_error(y, torch.stack([m(x) for m in modules])) < 1e-6


@pytest.mark.parametrize("activation", ["relu", "identity", "tanh"])
def test_transforms_of_other_activations(backend: str, activation: str) -> None:
    layer = dk.DendriticLayer(
        CONNECTIVITIES["ragged"](), activation=activation, dtype=torch.float64
    )
    x = torch.randn(5, 7, dtype=torch.float64)
    state = {name: p.detach() for name, p in layer.named_parameters()}
    f = lambda s, x: functional_call(layer, s, (x[None],)).sin().sum()  # noqa: E731
    per_sample = vmap(grad(f), in_dims=(None, 0))(state, x)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert oracle.relative_error(per_sample[name].sum(0), parameter.grad) < 1e-12


COMPILED = ["grad", "jacrev", "jvp", "vmap", "per-sample gradients", "ensemble"]


@pytest.mark.parametrize(
    ("kind", "transform"),
    [*(("dendritic", name) for name in COMPILED), ("sparse", "grad"), ("sparse", "ensemble")],
)
def test_compiled_transforms_are_exact(case: Case, transform: str) -> None:
    torch._dynamo.reset()
    run = TRANSFORMS[transform]
    compiled = torch.compile(lambda s, x: run(case.ours, s, x), backend="aot_eager")
    actual = tree_leaves(compiled(case.state, case.x))
    assert max(oracle.errors(actual, tree_leaves(run(case.exact, case.state, case.x)))) < 1e-12
