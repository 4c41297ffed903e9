"""Import in a fresh process: what it loads, and what a missing or broken extension does."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import dendrite_kernels as dk
from tests.marks import needs_cpp, needs_numba
from tests.processes import PACKAGE, copy_package, output


def test_import_is_light_and_changes_no_setting() -> None:
    """Numba takes seconds to import: only its own backend may do so."""
    output(
        f"HAS_CPP = {dk.backend_info()['cpp']['available']}"
        + """
import sys, torch
before = torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()
state = torch.random.get_rng_state()
import dendrite_kernels as dk
heavy = {"numba", "llvmlite", "matplotlib", "scipy"}
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


WITHOUT_SCIPY = """
import sys
sys.modules["scipy"] = None
import dendrite_kernels as dk, torch
from dendrite_kernels.benchmark.peers import reason_to_skip
from dendrite_kernels.benchmark.problem import Problem
c = dk.connectivity.random(9, 3, 2, 4, seed=0)
layer, x = dk.DendriticLayer(c), torch.randn(5, 9)
results = []
for name, entry in dk.backend_info().items():
    if entry["available"] and name != "cuda":
        with dk.use_backend(name):
            y = layer(x)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), layer.parameters())])
for result in results[1:]:
    torch.testing.assert_close(result, results[0])
assert reason_to_skip("scipy CSR", Problem.draw(c, batch=3)) == "scipy is not installed"
assert reason_to_skip("torch CSR by hand", Problem.draw(c, batch=3)) is None
for needs_it in (c.to_scipy, lambda: dk.interop.to_scipy(layer)):
    try:
        needs_it()
    except ImportError as error:
        print(error)
"""


def test_scipy_is_needed_for_its_matrices_only() -> None:
    printed = output(WITHOUT_SCIPY).splitlines()
    assert printed == 2 * ["to_scipy needs scipy: pip install 'dendrite-kernels[scipy]'"]


# Missing and broken extensions: fresh interpreters import a copy of the package


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


def test_the_source_folder_is_told_from_a_failed_build(tmp_path: Path) -> None:
    """Python finds it before the package that was installed from it."""
    package = copy_package(tmp_path)
    (tmp_path / "setup.py").touch()
    printed = output(
        "import dendrite_kernels as dk; print(dk.backend_info()['cpp']['reason'])", package
    )
    assert f"work in another folder than {tmp_path}, or pip install -e . there" in printed


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


MISSING_SYMBOL = b"raise ImportError('_cpu.so: undefined symbol: torch_parallel_for')"
OF_OTHER_SOURCES = b"def configure(exchange_api): pass"
OURS = f"_cpu{EXTENSION_SUFFIXES[0]}"
OTHER = "_cpu.cpython-39-x86_64-linux-gnu.so"


def cut_short() -> bytes:
    """The system would load it, and end the process where the file ends."""
    whole = (PACKAGE / OURS).read_bytes()
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (OURS, lambda: b"no machine code", "_cpu"),
        pytest.param(OURS, cut_short, "which was cut short: install", marks=needs_cpp),
        (OTHER, lambda: b"", f"Expected {OURS} for this Python, got {OTHER} in"),
        ("_cpu.py", lambda: MISSING_SYMBOL, "undefined symbol: torch_parallel_for"),
        ("_cpu.py", lambda: OF_OTHER_SOURCES, "from the sources of this version, got one of"),
    ],
    ids=["damaged", "cut short", "another Python", "a missing symbol", "other sources"],
)
def test_a_broken_extension_raises_an_error_with_the_cause(
    tmp_path: Path, name: str, content: Callable[[], bytes], message: str
) -> None:
    """A user who built the extension wants it: no other backend may replace it silently."""
    package = copy_package(tmp_path)
    (package / name).write_bytes(content())
    printed = output(
        """
import dendrite_kernels as dk, torch
layer = dk.DendriticLayer(dk.connectivity.random(9, 3, 2, 4, seed=0))
for attempt in (lambda: layer(torch.randn(5, 9)), lambda: dk.use_backend("cpp")):
    for _ in range(2):  # the second attempt must fail as the first did
        try:
            attempt()
        except ImportError as error:
            print(error)
        else:
            raise AssertionError("a broken extension went unnoticed")
with dk.use_backend("reference"):  # chosen by the user, it works
    assert layer(torch.randn(5, 9)).shape == (5, 3)
""",
        package,
    )
    lines = printed.splitlines()
    assert len(lines) == 4
    assert all(message in line for line in lines), lines


# Instruction sets: test_memory_bounds.py computes with each of them

EXACT = """
import dendrite_kernels as dk, torch
from tests.exact_cases import outputs, whole_numbers
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
