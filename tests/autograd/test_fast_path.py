"""The fast path to the C++ kernels: what may take it, and that it gives what the operators give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import dendrite_kernels as dk
from dendrite_kernels import autograd, fast_path

CPP = dk.backend_info()["cpp"]
pytestmark = pytest.mark.skipif(not CPP["available"], reason=f"backend cpp: {CPP['reason']}")


class Wrapped(Tensor):
    pass


BATCH = 5


def operands(dtype: torch.dtype = torch.float32, batch: int = BATCH) -> list[Any]:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    sizes = (batch, 30), (c.nnz,), (40,), (40,), (10,)
    return [*(torch.randn(size, dtype=dtype) for size in sizes), c]


def prepare(c: dk.Connectivity, batch: int = BATCH) -> None:
    """The operators make what the fast path needs: some for each size of batch, some for each
    dtype."""
    for dtype in (torch.float32, torch.float64):
        tensors = operands(dtype, batch)[:-1]
        with torch.no_grad():
            dk.functional.dendritic_layer(*tensors, c)
            dk.functional.sparse_linear(*tensors[:3], c)


def taken(operands: list[Any], batch: int = BATCH) -> bool:
    """Whether the fast path takes them, once it may."""
    with torch.no_grad():
        prepare(operands[-1], batch)
    return answer(*operands) is not None


def answer(*operands: Any) -> Tensor | None:
    """Without cable weights and soma biases they are those of a sparse linear layer."""
    x, w, dendrite_bias, cable, soma_bias, c = operands
    return autograd.fast_layer(x, w, dendrite_bias, cable, soma_bias, c, (0.1, 0.1))


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
    for which in (0, 1):
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


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_it_computes_what_the_operators_do(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with gradients and without, and so do calls that change over in between."""
    *tensors, c = operands(batch=batch)
    for tensor in tensors:
        tensor.requires_grad_()
    results: list[list[Tensor]] = []
    assert taken([*tensors, c], batch)
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
