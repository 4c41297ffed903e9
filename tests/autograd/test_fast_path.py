"""The short way to the kernels: who may take it, and that it leads to what the long one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import dendrite_kernels as dk
from dendrite_kernels import _derivatives, backends, fast_path, operators

INFO = dk.backend_info()
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not INFO[name]["available"], reason=f"backend {name}: {INFO[name]['reason']}"
        ),
    )
    for name in ("cpp", "numba")
]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dk.use_backend(request.param):
        yield request.param


class Wrapped(Tensor):
    pass


BATCH = 5


def operands(dtype: torch.dtype = torch.float32, batch: int = BATCH) -> list[Any]:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    sizes = (batch, 30), (c.nnz,), (40,), (40,), (10,)
    return [*(torch.randn(size, dtype=dtype) for size in sizes), c]


def prepare(c: dk.Connectivity, batch: int = BATCH) -> None:
    """The long way makes what the short one needs: some for each size of batch, some for each
    dtype."""
    for dtype in (torch.float32, torch.float64):
        tensors = operands(dtype, batch)[:-1]
        with torch.no_grad():
            dk.functional.dendritic_layer(*tensors, c)
            dk.functional.sparse_linear(*tensors[:3], c)


def taken(operands: list[Any], batch: int = BATCH) -> bool:
    """Whether the short way takes them, once it may."""
    with torch.no_grad():
        prepare(operands[-1], batch)
    return answer(*operands) is not None


def answer(*operands: Any) -> Tensor | None:
    """Without cable weights and soma biases they are those of a sparse linear layer."""
    x, w, dendrite_bias, cable, soma_bias, c = operands
    if cable is None and soma_bias is None:
        return fast_path.sparse_linear(x, w, dendrite_bias, c)
    return fast_path.dendritic_layer(x, w, dendrite_bias, cable, soma_bias, c, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("missing", [(), (2,), (4,), (2, 4), (3, 4), (2, 3, 4)], ids=str)
def test_plain_operands_take_it(dtype: torch.dtype, missing: tuple[int, ...]) -> None:
    given = [None if i in missing else t for i, t in enumerate(operands(dtype))]
    assert taken(given)
    assert taken([t.requires_grad_() if isinstance(t, Tensor) else t for t in given])


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "another class": lambda t: t.as_subclass(Wrapped),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "longer": lambda t: torch.cat([t, t], -1),
    "columns strided": lambda t: t.new_zeros(2 * t.numel()).as_strided(
        t.shape, (*t.stride()[:-1], 2)
    ),
    "one dimension more": lambda t: t[None],
    "one more behind": lambda t: t[..., None],
    "another dtype": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "half": lambda t: t.half(),
    "meta": lambda t: t.to("meta"),
    "sign pending": torch._neg_view,
    "an array": lambda t: t.numpy(),
    "a number": lambda t: 0.5,
}


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("change", CHANGES)
def test_other_operands_do_not(change: str, which: int) -> None:
    given = operands()
    given[which] = CHANGES[change](given[which])
    assert not taken(given)


def test_weights_are_not_optional() -> None:
    for which in (0, 1, 3):
        given = operands()
        given[which] = None
        assert not taken(given)


def test_observers_keep_a_call_from_it() -> None:
    given = operands()
    assert taken(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(given)
    with torch.profiler.profile():
        assert not taken(given)
    with forward_ad.dual_level():
        assert not taken(given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert answer(*given) is None
    with dk.use_backend("reference"):
        assert not taken(given)
    seen = []
    torch.func.vmap(lambda x: (seen.append(answer(x, *given[1:])), x)[1])(given[0])
    assert seen == [None]
    assert taken(given)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (1, 2, 3, 4)], ids=str)
def test_gradients_go_to_whatever_requires_them(which: tuple[int, ...]) -> None:
    given = operands()
    assert taken(given)
    for i in which:
        given[i].requires_grad_()
    y = answer(*given)
    assert y is not None
    assert y.requires_grad
    y.sum().backward()
    assert [t.grad is not None for t in given[:5]] == [i in which for i in range(5)]
    with torch.no_grad():
        quiet = answer(*given)
    assert quiet is not None
    assert not quiet.requires_grad
    assert torch.equal(quiet, y)


def test_what_it_returns_belongs_to_the_mode_of_the_call() -> None:
    given = operands()
    assert taken(given)
    with torch.inference_mode():
        y = answer(*given)
    assert y is not None
    assert y.is_inference()
    with torch.device("meta"):  # of new tensors, not of results
        y = answer(*given)
    assert y is not None
    assert y.device.type == "cpu"
    assert not y.is_inference()


def test_operators_take_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what they compute otherwise, and as many signs."""
    *tensors, c = operands()
    indices, op = operators.index_tensors(c), operators.dendritic_forward
    assert taken([*tensors, c])
    calls, module = [], getattr(backends, backend)
    kernel = module.dendritic_forward
    monkeypatch.setattr(module, "dendritic_forward", lambda *a: (calls.append(0), kernel(*a))[1])
    for save in (False, True):
        short = op(*tensors, *indices, 0.1, save)
        assert not calls
        with torch.profiler.profile():  # somebody watches
            long = op(*tensors, *indices, 0.1, save)
        assert len(calls) == 1
        calls.clear()
        assert torch.equal(short[0], long[0])
        of_samples = 2**5 - 1  # bits past the batch may be anything
        assert torch.equal(short[1] & of_samples, long[1] & of_samples)
        assert short[1].shape == ((40,) if save else (0,))
    assert torch.equal(
        operators.sparse_forward(*tensors[:3], *indices), module.sparse_forward(*tensors[:3], c)
    )


def test_operators_that_round_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way knows no rounding."""
    *tensors, c = operands()
    indices = operators.index_tensors(c)
    assert taken([*tensors, c])
    calls = (
        lambda *r: operators.dendritic_forward(*tensors, *indices, 0.1, False, *r)[0],
        lambda *r: operators.sparse_forward(*tensors[:3], *indices, *r),
    )
    for call in calls:
        plain, rounded = call(), call(True)
        assert not torch.equal(rounded, plain)
        monkeypatch.setattr(_derivatives, "topology_of", lambda *_: None)
        assert torch.equal(rounded, call(True))
        monkeypatch.undo()


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_it_computes_what_the_long_way_does(
    batch: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with gradients and without, and so do calls that change over in between."""
    *tensors, c = operands(batch=batch)
    for tensor in tensors:
        tensor.requires_grad_()
    results: list[list[Tensor]] = []
    assert taken([*tensors, c], batch) == (batch > 0 or backend == "cpp")
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(fast_path, "topology_of", lambda *_: None)
        for run, leaves in (
            (dk.functional.dendritic_layer, tensors),
            (dk.functional.sparse_linear, tensors[:3]),
        ):
            call: Any = run
            y = call(*leaves, c)
            gradients = torch.autograd.grad(y.sin().sum(), leaves)
            with torch.no_grad():
                results.append([y, call(*leaves, c), *gradients])
    for a, b in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(a[0], a[1])
