"""Who computes: the report, the choice, missing and broken backends, threads and processes."""

from __future__ import annotations

import importlib
import inspect
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels.backends import BackendUnavailable, select
from tests import oracle
from tests.processes import PACKAGE, copy_package, output

CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(
    not dk.backend_info()["cpp"]["available"], reason="the C++ backend was not built"
)
needs_numba = pytest.mark.skipif(
    not dk.backend_info()["numba"]["available"], reason="the Numba backend is unavailable"
)


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
    """Available means that it computes, unavailable that choosing it says the same reason."""
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
    assert entry["cache"] == "on" or entry["cache"].startswith("off: ")


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


def test_the_best_backend_serves_unasked() -> None:
    report = dk.backend_info()
    best = next(name for name in ("cpp", "numba") if report[name]["available"])
    assert serving() == best


def test_chosen_backend_computes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both functions of the chosen one are called, and none of the others."""
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
    """Sign words mean the same everywhere."""
    for name in (forward, backward):
        if not dk.backend_info()[name]["available"]:
            pytest.skip(f"backend {name} is unavailable")
    c = dk.connectivity.random(50, 70, 4, 9, seed=0)
    x = torch.randn(75, 50, dtype=dtype)
    x[::3] = 0  # where the bias is 0, too, u is, which counts as inactive
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


# Threads and processes


def whole_numbers(seed: int) -> tuple[dk.Connectivity, list[Tensor], Tensor]:
    """A case whose sums are exact in float32 in any order: x and parameters, incoming gradient."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=g).float()

    c = dk.connectivity.random(60, 30 + seed, 4, 8, seed=seed)
    sizes = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    return c, [draw(65, 60), *(draw(n) for n in sizes)], draw(65, c.num_somas)


def outputs(c: dk.Connectivity, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    function: Any = dk.functional.dendritic_layer
    y = function(*leaves, c, negative_slope=0.25)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def test_python_threads_do_not_disturb_each_other(backend: str) -> None:
    cases = [whole_numbers(seed) for seed in range(4)]
    with dk.use_backend("reference"):
        expected = [outputs(*case) for case in cases]

    def work(i: int) -> bool:  # own and shared connectivities, whose plans are built meanwhile
        return all(
            torch.equal(a, b)
            for k in range(12)
            for j in [(i + k) % len(cases)]
            for a, b in zip(outputs(*cases[j]), expected[j], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def test_backward_in_another_thread(backend: str) -> None:
    c, tensors, grad = whole_numbers(1)
    expected = outputs(c, tensors, grad)[1:]
    leaves = [t.clone().requires_grad_() for t in tensors]
    function: Any = dk.functional.dendritic_layer
    y = function(*leaves, c, negative_slope=0.25)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(torch.autograd.grad, y, leaves, grad).result()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# For scripts, which must not import this module: it would load every backend.
EXACT_CASES = f"""
import dendrite_kernels as dk, torch
from torch import Tensor
from typing import Any
{inspect.getsource(whole_numbers)}
{inspect.getsource(outputs)}
"""

FORK = """
import os, signal, sys, time
import numpy as np
torch.set_num_threads(2)
dk.use_backend(BACKEND)
case = whole_numbers(90)
new = whole_numbers(91)  # what the child meets for the first time
expected = outputs(*case)
child = os.fork()
if child == 0:
    same = all(np.array_equal(a, b) for a, b in zip(outputs(*case), expected))
    fresh = outputs(*new)
    info = dk.backend_info()[BACKEND]
    os._exit(0 if same and info["threads"] == 1 and fresh[0].isfinite().all() else 3)
end = time.monotonic() + 500
while time.monotonic() < end:
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
        break
    time.sleep(0.02)
else:
    os.kill(child, signal.SIGKILL)
    sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
assert all(np.array_equal(a, b) for a, b in zip(outputs(*case), expected))  # the parent goes on
assert dk.backend_info()[BACKEND]["threads"] == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_a_forked_child_computes(name: str) -> None:
    """The parent's worker threads are not there in the child; it must not wait for them."""
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    output(f"{EXACT_CASES}\nBACKEND = {name!r}\n{FORK}")


# Import


def test_import_is_light_and_changes_no_setting() -> None:
    """Numba takes seconds to import: only its own backend may do so."""
    output(
        f"HAS_CPP = {dk.backend_info()['cpp']['available']}"
        + """
import sys, torch
before = torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()
state = torch.random.get_rng_state()
import dendrite_kernels as dk
heavy = {"numba", "llvmlite", "matplotlib"}
assert not heavy & set(sys.modules)
after = torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()
assert before == after, (before, after)
assert torch.equal(state, torch.random.get_rng_state())
if HAS_CPP:
    layer = dk.DendriticLayer(dk.connectivity.random(9, 3, 2, 4, seed=0))
    layer(torch.randn(5, 9)).sum().backward()
    assert not heavy & set(sys.modules)
    assert torch.get_num_threads() == before[0]
""",
        OMP_NUM_THREADS="3",  # torch may grant fewer, on a machine with fewer cores
    )


# Missing and broken extensions: copies of the package, used by fresh interpreters


@needs_numba
def test_numba_serves_where_the_extension_is_missing(tmp_path: Path) -> None:
    printed = output(
        """
import dendrite_kernels as dk, torch, pathlib
from dendrite_kernels.backends import select
print(pathlib.Path(dk.__file__).parent)
entry = dk.backend_info()["cpp"]
assert entry["available"] is False
assert "was not built" in entry["reason"] and "compiler" in entry["reason"], entry
assert "isa" not in entry
assert select(torch.device("cpu")).__name__ == "dendrite_kernels.backends.numba"
try:
    dk.use_backend("cpp")
except dk.BackendUnavailable as error:
    assert entry["reason"] in str(error)
else:
    raise AssertionError("a missing backend was chosen")
c = dk.connectivity.random(9, 3, 2, 4, seed=0)
layer, x = dk.DendriticLayer(c), torch.randn(5, 9)
with torch.no_grad():
    y = layer(x)
    expected = dk.reference.dendritic_layer(x, *layer.parameters(), c)
assert torch.allclose(y, expected, atol=1e-5)
""",
        copy_package(tmp_path),
    )
    assert printed.strip() == str(tmp_path / PACKAGE.name)


def test_without_any_backend_the_reasons_are_given(tmp_path: Path) -> None:
    output(
        """
import dendrite_kernels as dk, torch
layer = dk.DendriticLayer(dk.connectivity.random(9, 3, 2, 4, seed=0))
try:
    layer(torch.randn(5, 9))
except dk.BackendUnavailable as error:
    assert "cpp: the extension" in str(error) and "numba: NUMBA_DISABLE_JIT" in str(error), error
else:
    raise AssertionError("something served silently")
with dk.use_backend("reference"):
    assert layer(torch.randn(5, 9)).shape == (5, 3)
""",
        copy_package(tmp_path),
        NUMBA_DISABLE_JIT="1",
    )


MISSING_SYMBOL = "raise ImportError('_cpu.so: undefined symbol: torch_parallel_for')"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (f"_cpu{EXTENSION_SUFFIXES[0]}", "no machine code", "_cpu"),
        ("_cpu.py", MISSING_SYMBOL, "undefined symbol: torch_parallel_for"),
    ],
    ids=["a damaged file", "a missing symbol"],
)
def test_a_broken_extension_raises_its_own_error(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    """It was meant to be there: nothing else may serve in its place unasked."""
    package = copy_package(tmp_path)
    (package / name).write_text(content)
    printed = output(
        """
import dendrite_kernels as dk, torch
layer = dk.DendriticLayer(dk.connectivity.random(9, 3, 2, 4, seed=0))
for attempt in (lambda: layer(torch.randn(5, 9)), lambda: dk.use_backend("cpp")):
    for _ in range(2):  # the second time too
        try:
            attempt()
        except ImportError as error:
            print(error)
        else:
            raise AssertionError("a broken extension went unnoticed")
with dk.use_backend("reference"):  # asked for, it may
    assert layer(torch.randn(5, 9)).shape == (5, 3)
""",
        package,
    )
    lines = printed.splitlines()
    assert len(lines) == 4
    assert all(message in line for line in lines), lines


# Instruction sets: test_memory_bounds.py computes with each of them

EXACT = f"""{EXACT_CASES}
from dendrite_kernels.backends import select
dk.use_backend("cpp")
for seed in range(6):
    case = whole_numbers(seed)
    for dtype in (torch.float32, torch.float64):
        case = case[0], [t.to(dtype) for t in case[1]], case[2].to(dtype)
        ours = outputs(*case)
        with dk.use_backend("reference"):
            expected = outputs(*case)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))
print(select(torch.device("cpu")).info()["isa"])
"""


@needs_cpp
def test_empty_choice_of_instruction_set_counts_as_unset() -> None:
    best = dk.backend_info()["cpp"]["supported_isas"][-1]
    assert output(EXACT, DENDRITE_KERNELS_ISA="").strip() == best


@needs_cpp
@needs_numba
def test_unknown_instruction_set_is_an_error() -> None:
    printed = output(
        """
import dendrite_kernels as dk
from dendrite_kernels.backends import numba
for attempt, kind in ((lambda: dk.use_backend("cpp"), ImportError), (numba.info, RuntimeError)):
    try:
        attempt()
    except kind as error:
        print(error)
""",
        DENDRITE_KERNELS_ISA="mmx",
    )
    cpp, numba = printed.splitlines()
    assert cpp.startswith("DENDRITE_KERNELS_ISA: Expected one of base")
    assert cpp.endswith("got mmx")
    assert numba.startswith("Expected DENDRITE_KERNELS_ISA among ['")
    assert numba.endswith("got 'mmx'")
