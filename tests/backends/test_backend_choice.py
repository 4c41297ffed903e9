"""What the package reports about its backends, and how a user chooses one."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.backends import BackendUnavailable, select
from tests import oracle
from tests.marks import needs_cpp, needs_numba

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def best_backend() -> Iterator[None]:
    with dk.use_backend(None):
        yield


def serving() -> str:
    """The backend that CPU tensors get."""
    return str(getattr(select(CPU), "__name__", None)).rpartition(".")[2]


# The report


def test_report() -> None:
    report = dk.backend_info()
    assert set(report) == {"cpp", "cuda", "numba", "reference"}
    for name, entry in report.items():
        assert isinstance(entry["available"], bool)
        assert (entry["reason"] is None) == entry["available"], name
        assert entry["available"] or len(entry["reason"]) > 10
        assert entry["torch"] == torch.__version__
        assert entry["platform"]
    assert report["reference"]["available"]


@pytest.mark.parametrize("name", ["cpp", "cuda", "numba", "reference"])
def test_report_is_honest(name: str) -> None:
    """An available backend computes; choosing an unavailable one gives the reported reason."""
    entry = dk.backend_info()[name]
    if entry["available"]:
        device = "cuda" if name == "cuda" else "cpu"
        layer = dk.DendriticLayer(dk.connectivity.random(9, 3, 2, 4, seed=0)).to(device)
        x = torch.randn(5, 9, device=device)
        with dk.use_backend(name), torch.no_grad():
            parameters = [p.double() for p in layer.parameters()]
            reference: Any = dk.reference.dendritic_layer
            expected = reference(x.double(), *parameters, layer.connectivity)
            assert oracle.relative_error(layer(x), expected) < 1e-6
    else:
        with pytest.raises(BackendUnavailable) as caught:
            dk.use_backend(name)
        assert f"backend {name!r}" in str(caught.value)
        assert entry["reason"] in str(caught.value)


@needs_cpp
def test_report_of_the_cpp_backend() -> None:
    entry = dk.backend_info()["cpp"]
    assert entry["supported_isas"][0] == "base"
    assert entry["isa"] in entry["supported_isas"]
    if not os.environ.get("DENDRITE_KERNELS_ISA"):
        assert entry["isa"] == entry["supported_isas"][-1]  # the best


@needs_cpp
@needs_numba
def test_backends_know_the_same_instruction_sets() -> None:
    """DENDRITE_KERNELS_ISA chooses for both: Numba may not refuse what C++ has."""
    vectors = importlib.import_module("dendrite_kernels.backends.numba.vectors")
    assert set(dk.backend_info()["cpp"]["supported_isas"]) <= set(vectors.ISA_BITS)


@needs_numba
def test_report_of_the_numba_backend() -> None:
    entry = dk.backend_info()["numba"]
    vectors = importlib.import_module("dendrite_kernels.backends.numba.vectors")
    assert entry["isa"] in vectors.ISA_BITS
    assert entry["numba"]
    assert entry["llvmlite"]
    assert entry["cache"] in ("on", "not used yet") or entry["cache"].startswith("off: ")


@needs_numba
def test_numba_takes_neon_on_arm_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment variable serves both backends."""
    token = importlib.import_module("dendrite_kernels.backends.numba.vectors")
    monkeypatch.setenv("DENDRITE_KERNELS_ISA", "neon")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(RuntimeError, match=r"Expected DENDRITE_KERNELS_ISA among .*, got 'neon'"):
        token.isa.__wrapped__()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert token.isa.__wrapped__() == "neon"
    monkeypatch.delenv("DENDRITE_KERNELS_ISA")
    assert token.isa.__wrapped__() in token.ISA_BITS


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_report_follows_torch_s_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = dk.backend_info()
        assert {e["threads"] for e in report.values() if e["available"]} == {threads}
    finally:
        torch.set_num_threads(before)


# The choice


def test_the_best_backend_is_the_default() -> None:
    report = dk.backend_info()
    best = next(name for name in ("cpp", "numba") if report[name]["available"])
    assert serving() == best


def test_chosen_backend_computes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the functions of the chosen backend are called."""
    called: list[tuple[str, str]] = []
    for name in ("cpp", "numba", "reference"):
        if not dk.backend_info()[name]["available"]:
            continue
        with dk.use_backend(name):
            module = select(CPU)
        for function in ("forward", "backward"):

            def spy(label: tuple[str, str], real: Any, *args: Any) -> Any:
                called.append(label)
                return real(*args)

            real = getattr(module, function)
            monkeypatch.setattr(module, function, partial(spy, (name, function), real))
    c = dk.connectivity.random(9, 3, 2, 4, seed=0)
    x = torch.randn(5, 9, requires_grad=True)
    dk.DendriticLayer(c)(x).sum().backward()
    dk.SparseLinear(c)(x).sum().backward()
    assert called == [(backend, "forward"), (backend, "backward")] * 2


def test_use_backend_sets_for_all_later_calls() -> None:
    best = serving()
    dk.use_backend("reference")
    assert serving() == "reference"
    dk.use_backend(None)
    assert serving() == best


@needs_numba
def test_use_backend_nests() -> None:
    best = serving()
    with dk.use_backend("reference"):
        assert serving() == "reference"
        with dk.use_backend("numba"):
            assert serving() == "numba"
            with dk.use_backend(None):
                assert serving() == best
            assert serving() == "numba"
        assert serving() == "reference"
    assert serving() == best


def test_use_backend_as_a_setter_inside_a_context_ends_with_it() -> None:
    best = serving()
    with dk.use_backend("reference"):
        dk.use_backend(None)
        assert serving() == best
    assert serving() == best


def test_use_backend_restores_after_an_error() -> None:
    best = serving()
    with pytest.raises(ZeroDivisionError), dk.use_backend("reference"):
        raise ZeroDivisionError
    assert serving() == best


@pytest.mark.parametrize("name", ["", "cp", "CPP", "triton", 3, ["cpp"]])
def test_unknown_backend(name: Any) -> None:
    with dk.use_backend("reference"):
        with pytest.raises(ValueError, match=r"Expected a backend of \['cpp', 'cuda', .* got "):
            dk.use_backend(name)
        assert serving() == "reference"  # a failed choice changes nothing


@pytest.mark.skipif(dk.backend_info()["cuda"]["available"], reason="CUDA is available")
def test_unavailable_backend_says_why_and_changes_nothing() -> None:
    with dk.use_backend("reference"):
        with pytest.raises(BackendUnavailable, match=r"Expected backend 'cuda' .* got: .*CUDA"):
            dk.use_backend("cuda")
        assert serving() == "reference"
    assert issubclass(BackendUnavailable, RuntimeError)


@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_no_backend_is_taken_for_another_device(name: str) -> None:
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    with dk.use_backend(name), pytest.raises(BackendUnavailable, match=f"on cpu for .*'{name}'"):
        select(torch.device("cuda"))
    with pytest.raises(BackendUnavailable, match=r"Expected tensors on one of .* got mps"):
        select(torch.device("mps"))


# Backends together

PAIRS = [(a, b) for a in ("cpp", "numba", "reference") for b in ("cpp", "numba", "reference")]


@pytest.mark.parametrize(("forward", "backward"), [pair for pair in PAIRS if pair[0] != pair[1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_on_another_backend(forward: str, backward: str, dtype: torch.dtype) -> None:
    """All backends store and read sign words in the same way."""
    for name in (forward, backward):
        if not dk.backend_info()[name]["available"]:
            pytest.skip(f"backend {name} is unavailable")
    c = dk.connectivity.random(50, 70, 4, 9, seed=0)
    x = torch.randn(75, 50, dtype=dtype)
    x[::3] = 0  # with a bias of 0 this gives u == 0, which counts as inactive
    grad = torch.randn(75, 70, dtype=dtype) + 1
    leaves = [x, *(p.detach() for p in dk.DendriticLayer(c, dtype=dtype).parameters())]
    leaves[2][::2] = 0
    leaves = [leaf.requires_grad_() for leaf in leaves]
    function: Any = dk.functional.dendritic_layer
    with dk.use_backend(forward):
        y = function(*leaves, c)
    with dk.use_backend(backward):
        ours = torch.autograd.grad(y, leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference: Any = oracle.dendritic_layer
    expected = torch.autograd.grad(reference(*exact, c, 0.1), exact, grad.double())
    assert max(oracle.errors(ours, expected)) < (1e-6 if dtype == torch.float32 else 1e-13)
