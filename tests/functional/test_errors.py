"""Bad input says what was expected and what came; no input at all crashes the process."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, activations, connectivity
from tests.processes import run_python

N, S, R = 30, 10, 40
Change = Callable[[Tensor], Any]


def network() -> Connectivity:
    return connectivity.random(N, S, 4, 6, seed=0)


def arguments(somas: bool) -> dict[str, Any]:
    """Good arguments of the function, on 5 samples."""
    c = network()
    x, weight = torch.randn(5, N), torch.randn(c.nnz)
    if not somas:
        return {"x": x, "weight": weight, "bias": torch.randn(R), "connectivity": c}
    return {
        "x": x,
        "synapse_weight": weight,
        "dendrite_bias": torch.randn(R),
        "cable_weight": torch.randn(R),
        "soma_bias": torch.randn(S),
        "connectivity": c,
    }


def function(somas: bool) -> Callable[..., Tensor]:
    return dk.functional.dendritic_layer if somas else dk.functional.sparse_linear


BOTH = pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
PARAMETERS = [
    (somas, name)
    for somas in (True, False)
    for name in arguments(somas)
    if name not in ("x", "connectivity")
]

# Functions and modules


BAD_X: list[tuple[Change, type[Exception], str]] = [
    (lambda x: x[:, 1:], ValueError, r"x of shape \[\.\.\., 30\], got \[5, 29\]"),
    (lambda x: x.T, ValueError, r"x of shape \[\.\.\., 30\], got \[30, 5\]"),
    (lambda x: x[:0].T, ValueError, r"x of shape \[\.\.\., 30\], got \[30, 0\]"),
    (lambda x: x.reshape(5, N, 1), ValueError, r"x of shape \[\.\.\., 30\], got \[5, 30, 1\]"),
    (lambda x: x[0, 0], ValueError, r"x of shape \[\.\.\., 30\], got \[\]"),
    (lambda x: x[0, :0], ValueError, r"x of shape \[\.\.\., 30\], got \[0\]"),
    (lambda x: x.half(), TypeError, r"weight of dtype torch\.float16 like x, got torch\.float32"),
    (lambda x: x.int(), TypeError, r"x of dtype float32, .*, got torch\.int32"),
    (lambda x: x > 0, TypeError, r"x of dtype float32, .*, got torch\.bool"),
    (lambda x: x + 0j, TypeError, r"x of dtype float32, .*, got torch\.complex64"),
    (lambda x: x.numpy(), TypeError, "x to be a torch.Tensor, got ndarray"),
    (lambda x: x.tolist(), TypeError, "x to be a torch.Tensor, got list"),
    (lambda x: None, TypeError, "x to be a torch.Tensor, got NoneType"),
    (lambda x: x.double(), TypeError, r"weight of dtype torch\.float64 like x, got torch\.float32"),
    (lambda x: x.to("meta"), ValueError, "weight on meta like x, got cpu"),
]


@BOTH
@pytest.mark.parametrize(("change", "error", "message"), BAD_X)
def test_bad_x(
    backend: str, somas: bool, change: Change, error: type[Exception], message: str
) -> None:
    good = arguments(somas)
    with pytest.raises(error, match=f"Expected .*{message}"):
        function(somas)(**{**good, "x": change(good["x"])})
    layer = dk.DendriticLayer(network()) if somas else dk.SparseLinear(network())
    with pytest.raises(error, match=f"Expected .*{message}"):
        layer(change(good["x"]))


BAD_PARAMETER: list[tuple[Change, type[Exception], str]] = [
    (lambda p: p[1:], ValueError, r"of shape \[{n}\], got \[{less}\]"),
    (lambda p: torch.cat([p, p[:1]]), ValueError, r"of shape \[{n}\], got \[{more}\]"),
    (lambda p: p[:1], ValueError, r"of shape \[{n}\], got \[1\]"),  # would broadcast
    (lambda p: p[:0], ValueError, r"of shape \[{n}\], got \[0\]"),
    (lambda p: p[0], ValueError, r"of shape \[{n}\], got \[\]"),
    (lambda p: p[None], ValueError, r"of shape \[{n}\], got \[1, {n}\]"),
    (lambda p: p[:, None], ValueError, r"of shape \[{n}\], got \[{n}, 1\]"),
    (lambda p: p.double(), TypeError, r"of dtype torch\.float32 like x, got torch\.float64"),
    (lambda p: p.half(), TypeError, r"of dtype torch\.float32 like x, got torch\.float16"),
    (lambda p: p.long(), TypeError, r"of dtype torch\.float32 like x, got torch\.int64"),
    (lambda p: p.to("meta"), ValueError, "on cpu like x, got meta"),
    (lambda p: p.numpy(), TypeError, "to be a torch.Tensor, got ndarray"),
    (lambda p: 0.5, TypeError, "to be a torch.Tensor, got float"),
]


@pytest.mark.parametrize(("somas", "name"), PARAMETERS)
@pytest.mark.parametrize(("change", "error", "message"), BAD_PARAMETER)
def test_bad_parameter(
    backend: str, somas: bool, name: str, change: Change, error: type[Exception], message: str
) -> None:
    good = arguments(somas)
    n = good[name].numel()
    text = message.replace("{n}", str(n)).replace("{less}", str(n - 1))
    with pytest.raises(error, match=f"Expected {name} {text.replace('{more}', str(n + 1))}"):
        function(somas)(**{**good, name: change(good[name])})


@BOTH
def test_only_biases_are_optional(backend: str, somas: bool) -> None:
    good = arguments(somas)
    for name in good:
        if name.endswith("bias"):
            assert function(somas)(**{**good, name: None}).isfinite().all()
        else:
            with pytest.raises(TypeError, match=r"Expected .* got NoneType"):
                function(somas)(**{**good, name: None})


@BOTH
@pytest.mark.parametrize(
    "other",
    [None, 3, "random", np.ones((3, 3), bool), torch.ones(3)],
    ids=["None", "int", "str", "ndarray", "Tensor"],
)
def test_connectivity_of_another_kind(somas: bool, other: Any) -> None:
    kind = type(other).__name__
    with pytest.raises(TypeError, match=f"Expected a Connectivity, got {kind}"):
        function(somas)(**{**arguments(somas), "connectivity": other})
    module: Any = dk.DendriticLayer if somas else dk.SparseLinear
    with pytest.raises(TypeError, match=f"Expected a Connectivity, got {kind}"):
        module(other)


@pytest.mark.parametrize("slope", [-0.1, -1e-30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_bad_slope(backend: str, slope: float, activation: str) -> None:
    message = f"Expected a finite negative_slope >= 0, got {slope}"
    options: Any = {"negative_slope": slope, "activation": activation}
    with pytest.raises(ValueError, match=message):
        dk.functional.dendritic_layer(**arguments(True), **options)
    with pytest.raises(ValueError, match=message):
        dk.DendriticLayer(network(), **options)


@pytest.mark.parametrize("slope", [-0.1, math.nan, math.inf])
def test_bad_slope_of_a_sparse_linear(slope: float) -> None:
    """It decides how weights start: NaN weights or an error, now or in training."""
    with pytest.raises(ValueError, match=f"Expected a finite negative_slope >= 0, got {slope}"):
        dk.SparseLinear(network(), negative_slope=slope)


def test_a_negative_slope_in_the_table_is_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """|u| has one: outputs would be right and gradients wrong."""
    monkeypatch.setitem(activations._TABLE, "abs", (-1.0, torch.abs))
    with pytest.raises(ValueError, match=r"Expected a finite negative_slope >= 0, got -1\.0"):
        dk.functional.dendritic_layer(**arguments(True), activation="abs")


@pytest.mark.parametrize("activation", ["swish", "", "ReLU", None, 3])
def test_unknown_activation(backend: str, activation: Any) -> None:
    message = r"Expected an activation of \['elu', .*'tanh'\], got "
    with pytest.raises(ValueError, match=message + repr(activation)):
        dk.functional.dendritic_layer(**arguments(True), activation=activation)
    with pytest.raises(ValueError, match=message + repr(activation)):
        dk.DendriticLayer(network(), activation=activation)


@pytest.mark.parametrize("module", [dk.DendriticLayer, dk.SparseLinear])
def test_bad_options_of_modules(module: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected init of \['fan_in', 'paper'\], got 'zeros'"):
        module(network(), init="zeros")
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"Expected parameters of dtype float32.*, got {dtype}"):
            module(network(), dtype=dtype)


# Connectivities: one line for each kind of bad size; every message is in their own tests


@pytest.mark.parametrize(
    "call",
    [
        lambda: Connectivity.from_csr([0, 2, 4], [0, 1, 2, 1], 3),  # unsorted
        lambda: Connectivity.from_csr([0, 2], [1, 1], 3),  # twice
        lambda: Connectivity.from_csr([0, 2], [0, 3], 3),  # out of range
        lambda: Connectivity.from_csr([0, 2], [-1, 0], 3),
        lambda: Connectivity.from_csr([0, 3], [0, 1], 3),  # pointers past the end
        lambda: Connectivity.from_csr([0, 2, 1, 2], [0, 1], 3),
        lambda: Connectivity.from_csr([0], [], 3),  # no dendrite
        lambda: Connectivity.from_csr([0, 1], [0], 0),  # no input
        lambda: Connectivity.from_csr([0, 1], [0], 2**31),
        lambda: Connectivity.from_csr([0, 1], [0], 1, soma_ptr=[0]),  # no soma
        lambda: Connectivity.from_csr([0, 1], [0], 1, soma_ptr=[0, 2]),
        lambda: connectivity.random(0, 1, 1, 1),
        lambda: connectivity.random(10, -1, 1, 1),
        lambda: connectivity.random(10, 1, 0, 1),
        lambda: connectivity.random(10, 1, 1, 11),  # more synapses than inputs
        lambda: connectivity.random(10, 1, 1, -1, constant_fan_in=True),
        lambda: connectivity.local_receptive_fields((4, 4), 2, 2, 17),  # than pixels
        lambda: connectivity.local_receptive_fields((4, -4), 2, 2, 3),
        lambda: connectivity.local_receptive_fields((-4, -4), 2, 2, 3),
        lambda: connectivity.global_receptive_fields((4, 4), 2, 2, 17),
        lambda: connectivity.global_receptive_fields((4, 4), 2, 2, 3, channels=-3),
        lambda: connectivity.all_to_all(4, 0, 2),
        lambda: connectivity.all_to_all(2**20, 2**10, 2),
        lambda: connectivity.pseudo_image(-4),
    ],
)
def test_bad_connectivities(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"Expected .*got"):
        call()


# Operators: callable by anyone through torch.ops, so they must not trust their arguments


def operator_arguments() -> dict[str, dict[str, Any]]:
    """Good arguments of both operators, with a cable and without, on 5 samples."""
    good = arguments(True)
    c = good.pop("connectivity")
    indices = {name: getattr(c, name) for name in ("crow_indices", "col_indices", "soma_ptr")}
    x, weight, soma_bias = good["x"], good["synapse_weight"], good.pop("soma_bias")
    forward = {
        **good,
        "soma_bias": soma_bias,
        **indices,
        "negative_slope": 0.1,
        "soma_slope": 0.1,
        "save_signs": True,
    }
    y, signs = torch.ops.dendrite_kernels.forward(**forward)
    none = {"cable_weight": None, "negative_slope": 1.0, "soma_slope": 1.0, **indices}
    sparse = {"x": x, "synapse_weight": weight, "dendrite_bias": good["dendrite_bias"], **none}
    return {
        "forward": forward,
        "backward": {
            **good, "grad": torch.ones(5, S), "y": y, "signs": signs, **indices,
            "negative_slope": 0.1, "soma_slope": 0.1, "need_x": True,
        },
        "forward without cable": {**sparse, "soma_bias": None, "save_signs": False},
        "backward without cable": {
            **sparse, "grad": torch.ones(5, R), "y": None, "signs": None, "need_x": True,
        },
    }  # fmt: skip


OPERATORS = {
    "forward": ["x", "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias"],
    "backward": [
        "grad", "x", "y", "signs", "synapse_weight", "dendrite_bias", "cable_weight",
    ],
    "forward without cable": ["x", "synapse_weight", "dendrite_bias"],
    "backward without cable": ["grad", "x", "synapse_weight"],
}  # fmt: skip
BAD_TENSORS: dict[str, Change] = {
    "shorter": lambda t: t[..., 1:],
    "longer": lambda t: torch.cat([t, t[..., :1]], -1),
    "one": lambda t: t[..., :1],
    "none": lambda t: t[..., :0],
    "fewer rows": lambda t: t[1:],
    "no rows": lambda t: t[:0],
    "0-d": lambda t: t.flatten()[0],
    "one dimension more": lambda t: t[None],
    "half": lambda t: t.half(),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}
BAD_INDICES: dict[str, dict[str, Any]] = {
    "crow of another network": {
        "crow_indices": connectivity.random(N, S, 4, 7, seed=1).crow_indices
    },
    "all of another": {
        name: getattr(connectivity.random(N, 8, 4, 7, seed=1), name)
        for name in ("crow_indices", "col_indices", "soma_ptr")
    },
    "columns out of range": {"col_indices": torch.full((240,), 10**6, dtype=torch.int32)},
    "columns of -1": {"col_indices": torch.full((240,), -1, dtype=torch.int32)},
    "columns in float": {"col_indices": torch.zeros(240)},
    "too few columns": {"col_indices": torch.zeros(3, dtype=torch.int32)},
    "no columns": {"col_indices": torch.zeros(0, dtype=torch.int32)},
    "crow of two dimensions": {"crow_indices": torch.zeros(4, 4, dtype=torch.int32)},
    "empty crow": {"crow_indices": torch.zeros(0, dtype=torch.int32)},
    "soma_ptr too far": {"soma_ptr": torch.tensor([0, 41], dtype=torch.int32)},
    "empty soma_ptr": {"soma_ptr": torch.zeros(0, dtype=torch.int32)},
}


MISSING: list[tuple[str, dict[str, Any]]] = [
    ("backward", {"y": None}),
    ("backward", {"signs": None}),
    ("forward", {"cable_weight": None}),  # with a bias of somas
    ("forward without cable", {"soma_bias": torch.zeros(S)}),
]

# More inputs than any column names; the same sign words in another shape.
HARMLESS = {("x", "longer"), ("signs", "one dimension more")}


def bad_operator_calls() -> list[tuple[str, Callable[[], object]]]:
    calls: list[tuple[str, Callable[[], object]]] = []
    for operator, names in OPERATORS.items():
        good = operator_arguments()[operator]
        call = partial(getattr(torch.ops.dendrite_kernels, operator.split()[0]), **good)
        call()
        for name in names:
            for label, change in BAD_TENSORS.items():
                if name == "x" and "forward" in operator and label in ("fewer rows", "no rows"):
                    continue  # just another batch
                if name == "x" and "forward" in operator and label == "half":
                    continue  # parameters may be float32 beside samples of low precision
                if (name, label) in HARMLESS or label == "meta":
                    continue  # a meta operand makes a meta result
                bad = {name: change(good[name])}
                calls.append((f"{operator}: {name} {label}", partial(call, **bad)))
        for label, indices in BAD_INDICES.items():
            calls.append((f"{operator}: {label}", partial(call, **indices)))
        for slope in (-1.0, -1e-30, math.nan, math.inf):
            for name in ("negative_slope", "soma_slope"):
                calls.append((f"{operator}: {name} {slope}", partial(call, **{name: slope})))
    for operator, missing in MISSING:
        good = operator_arguments()[operator]
        call = partial(getattr(torch.ops.dendrite_kernels, operator.split()[0]), **good)
        calls.append((f"{operator}: {missing}", partial(call, **missing)))
    return calls


def operator_calls_gone_wrong(strict: bool) -> list[str]:
    """Bad calls that raise something odd, or (strict) nothing."""
    wrong = []
    for label, call in bad_operator_calls():
        print("now", label, flush=True)  # the last line is where it crashed
        try:
            call()
        except (ValueError, TypeError, RuntimeError):
            continue
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}")
        else:
            wrong += [label] * strict
    return wrong


@pytest.mark.parametrize("name", ["cpp", "numba", "reference"])
def test_bad_operator_calls_raise(name: str) -> None:
    """In a process of its own. The oracle may broadcast or ignore what it does not need."""
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    done = run_python(
        f"""
import dendrite_kernels as dk
from tests.functional import test_errors
dk.use_backend({name!r})
wrong = test_errors.operator_calls_gone_wrong(strict={name != "reference"})
print("wrong:", *wrong, sep="\\n")
"""
    )
    before, _, wrong = done.stdout.partition("wrong:\n")
    assert done.returncode == 0, (done.returncode, before.splitlines()[-1:], done.stderr[-3000:])
    assert wrong.splitlines() == []


def test_index_tensors_need_not_be_those_of_a_connectivity(backend: str) -> None:
    """Nor may what an operator remembers of them serve other pointers or other inputs."""

    def op(x: Tensor, weight: Tensor, bias: None, *indices: Tensor) -> Tensor:
        found: Tensor = torch.ops.dendrite_kernels.forward(
            x, weight, bias, None, None, *indices, 1.0, 1.0, False
        )[0]
        return found

    col = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    soma_ptr = torch.tensor([0, 1, 2], dtype=torch.int32)
    x, weight = torch.randn(3, 5), torch.randn(4)
    for crow in ([0, 2, 4], [0, 1, 4], [0, 4, 4]):
        expected = dk.reference.sparse_linear(x, weight, None, Connectivity.from_csr(crow, col, 5))
        for _ in range(2):
            found = op(x, weight, None, torch.tensor(crow, dtype=torch.int32), col, soma_ptr)
            torch.testing.assert_close(found, expected)
    wider = torch.randn(3, 7)
    expected = dk.reference.sparse_linear(wider, weight, None, Connectivity.from_csr(crow, col, 7))
    found = op(wider, weight, None, torch.tensor(crow, dtype=torch.int32), col, soma_ptr)
    torch.testing.assert_close(found, expected)
    with pytest.raises((ValueError, RuntimeError)):  # fewer inputs than columns name
        op(x[:, :3], weight, None, torch.tensor(crow, dtype=torch.int32), col, soma_ptr)


@pytest.mark.parametrize("lazy", ["x", "weight", "grad"])
def test_pending_sign_is_not_lost(backend: str, lazy: str) -> None:
    """The imaginary part of a conjugate is a view with its sign pending: no pointer shows that."""
    c = Connectivity.from_csr([0, 1, 1], [0], 1, soma_ptr=[0, 2])
    three = dict(zip(("x", "weight", "grad"), torch.rand(3, 1, 1) + 0.5, strict=True))
    x, weight, grad = three.values()
    expected = [x * weight, grad * weight, grad[0] * x[0]]
    three[lazy] = torch.complex(three[lazy], -three[lazy]).conj().imag
    assert three[lazy].is_neg()
    x, weight, grad = three["x"], three["weight"][0], three["grad"]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    for somas in (True, False):
        if somas:
            cable = torch.ones(2)
            y = dk.functional.dendritic_layer(x, weight, None, cable, None, c)
        else:
            y = dk.functional.sparse_linear(x, weight, None, c)[:, :1]
        found = [y, *torch.autograd.grad(y, leaves, grad)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
