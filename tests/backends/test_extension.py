"""The compiled module: what it links, what its parts export, what it checks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels.backends import _order, cpp
from tests.cpu_kernels import build
from tests.processes import output

EXTENSION: Any = cpp._load()[0]
PLAN_ARRAYS = "column_ptr", "column", "groups", "slot_ptr", "row", "slot", "synapse"
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="_cpu was not built")


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing")
    return found


def symbols(file: Path, *options: str, nm: str = "nm") -> list[tuple[str, str]]:
    """(type, name) of each symbol, as nm prints them."""
    printed = subprocess.run(
        [tool(nm), *options, str(file)], capture_output=True, text=True, check=True
    ).stdout
    return [(m[1], m[2]) for m in re.finditer(r"^(?:[0-9a-f]+)? +([A-Za-z]) (\S+)", printed, re.M)]


# What it links


@needs_extension
def test_extension_needs_no_symbol_of_torch_or_openmp() -> None:
    """One binary for every torch version; torch brings the only OpenMP runtime."""
    undefined = [name for _, name in symbols(Path(EXTENSION.__file__), "-D", "--undefined-only")]
    assert any(name.startswith("Py") for name in undefined)  # nm works
    foreign = re.compile(r"torch|c10|at::|_ZN2at|caffe|gomp|omp_|kmp", re.I)
    assert [name for name in undefined if foreign.search(name)] == []


@needs_extension
def test_extension_exports_its_entry_only() -> None:
    defined = [name for _, name in symbols(Path(EXTENSION.__file__), "-D", "--defined-only")]
    assert [name for name in defined if not name.startswith("_Z")] == ["PyInit__cpu"]
    assert not [name for name in defined if "dk" in name]


@needs_extension
def test_extension_links_no_openmp_library() -> None:
    tool("readelf")
    file = str(EXTENSION.__file__)
    printed = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True)
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", printed.stdout)
    assert any(name.startswith("libc.") for name in libraries)
    assert not [name for name in libraries if re.search(r"omp|torch|c10", name)]


# What its parts export


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "neon"])
def test_instruction_set_units_share_no_symbol(target: str) -> None:
    """A weak symbol (an inline function of the standard library, say) that two units define is
    linked once, from any of them: an old CPU would then meet instructions it does not have.
    """
    reason = build.missing(target)
    if reason is not None:
        pytest.skip(reason)
    units = build.units(target)[1:]  # base may share
    if not units:
        pytest.skip(f"base only on {build.HOST}")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda unit: build.compile_unit(target, unit), units))
    exported = []
    for made in objects:
        found = symbols(made, nm=f"{build.TARGETS[target].prefix}nm")
        assert [s for s in found if s[0] in "WwVvu"] == [], made.name
        exported += [name for kind, name in found if kind.isupper() and kind != "U"]
        assert {name for kind, name in found if kind == "U"} <= {
            "memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_",
        }  # fmt: skip
    assert len(exported) == len(set(exported)) == len(objects)  # each its table, nothing else
    assert all("kernels_" in name for name in exported)


# What it checks


def network() -> dk.Connectivity:
    return dk.connectivity.random(30, 10, 4, 6, seed=0)


def call(kind: str, **changed: Any) -> None:
    """_cpu.forward or _cpu.backward on 33 samples, with some arguments changed."""
    dk.use_backend("cpp")  # configures the module
    dk.use_backend(None)
    c = network()
    values: dict[str, Any] = {
        "topology": cpp._transposed(c),
        "grad": torch.randn(33, 10),
        "x": torch.randn(33, 30),
        "y": torch.zeros(33, 10),
        "signs": torch.zeros(2, 40, dtype=torch.int32),
        "synapse_weight": torch.randn(240),
        "dendrite_bias": torch.randn(40),
        "cable_weight": torch.randn(40),
        "soma_bias": torch.randn(10),
        "slope": 0.1,
        "soma_slope": 0.1,
        "round_x": False,
        "dx": torch.empty(33, 30),
        "dw": torch.empty(240),
        "dbd": torch.empty(40),
        "dc": torch.empty(40),
        "dbs": torch.empty(10),
        "threads": 2,
    }
    assert set(changed) <= set(values)
    values |= changed
    order = {
        "forward": (
            "topology", "x", "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias",
            "slope", "soma_slope", "round_x", "y", "signs", "threads",
        ),
        "backward": (
            "topology", "grad", "x", "y", "signs", "synapse_weight", "dendrite_bias",
            "cable_weight", "slope", "soma_slope", "dx", "dw", "dbd", "dc", "dbs", "threads",
        ),
    }  # fmt: skip
    getattr(EXTENSION, kind)(*(values[name] for name in order[kind]))


TENSORS = [
    ("forward", name)
    for name in (
        "x", "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias", "y", "signs",
    )
] + [
    ("backward", name)
    for name in (
        "grad", "x", "y", "signs", "synapse_weight", "dendrite_bias", "cable_weight", "dx", "dw",
        "dbd", "dc", "dbs",
    )
]  # fmt: skip
SHAPES = {
    "x": (33, 30), "grad": (33, 10), "y": (33, 10), "signs": (2, 40), "dx": (33, 30),
    "synapse_weight": (240,), "dw": (240,), "soma_bias": (10,), "dbs": (10,),
}  # fmt: skip
BAD: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "strided": (
        lambda t: torch.stack([t, t], -1)[..., 0], ValueError, "Expected a contiguous tensor",
    ),
    "shorter": (lambda t: t[..., 1:].contiguous(), ValueError, "Expected shape .* got"),
    "one": (lambda t: t[..., :1].contiguous(), ValueError, "Expected shape .* got"),
    "fewer rows": (lambda t: t[1:].contiguous(), ValueError, "Expected shape .* got"),
    "one dimension more": (lambda t: t[None], ValueError, "Expected (shape|2 dimensions).* got"),
    "float64": (lambda t: t.double(), TypeError, "Expected dtype .* got"),
    "float16": (lambda t: t.half(), TypeError, "Expected dtype .* got"),
    "bfloat16": (lambda t: t.bfloat16(), TypeError, "Expected dtype .* got"),
    "complex64": (lambda t: t.to(torch.complex64), TypeError, "Expected dtype .* got"),
    "int64": (lambda t: t.long(), TypeError, "Expected dtype .* got"),
    "uint8": (lambda t: t.to(torch.uint8), TypeError, "Expected dtype .* got"),
    "meta": (lambda t: t.to("meta"), RuntimeError, "meta"),
    "without memory": (
        lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        ValueError, "Expected a tensor in memory, got none",
    ),
    "numpy": (lambda t: t.numpy(), (TypeError, RuntimeError), "numpy.ndarray"),  # type: ignore[dict-item]
    "list": (lambda t: t.tolist(), TypeError, "Expected a torch.Tensor, got list"),
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_bad_tensors_are_refused(kind: str, name: str, fault: str) -> None:
    """A wrong one may not reach a pointer, from any caller."""
    change, error, message = BAD[fault]
    dtype = torch.int32 if name == "signs" else torch.float32
    good = torch.zeros(SHAPES.get(name, (40,)), dtype=dtype)
    call(kind, **{name: good})
    with pytest.raises(error, match=message):
        call(kind, **{name: change(good)})


@needs_extension
def test_names_are_in_the_messages() -> None:
    with pytest.raises(ValueError, match=r"signs: Expected shape \[2, 40\], got \[1, 40\]"):
        call("forward", signs=torch.zeros(1, 40, dtype=torch.int32))
    with pytest.raises(TypeError, match="cable_weight: Expected dtype float32, got"):
        call("forward", cable_weight=torch.zeros(40, dtype=torch.float64))


@needs_extension
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pair
        for pair in TENSORS
        if pair[1] in ("x", "synapse_weight", "grad", "dw", "dbd", "dc", "dbs")
    ]
    + [("forward", "y"), ("backward", "y"), ("backward", "signs")],
)
def test_only_some_tensors_are_optional(kind: str, name: str) -> None:
    with pytest.raises(TypeError, match=r"Expected a torch\.Tensor, got NoneType"):
        call(kind, **{name: None})


@needs_extension
def test_gradient_of_x_needs_the_plan() -> None:
    topology = cpp._topology(network())
    with pytest.raises(ValueError, match=r"Expected a transposed plan .*, got none"):
        call("backward", topology=topology)
    call("backward", topology=topology, dx=None)


@needs_extension
def test_orders_of_somas_are_not_for_rows() -> None:
    c = dk.connectivity.local_receptive_fields((9, 7), 70, 3, 16, seed=0)
    orders = {True: _order.by_centre(c), False: _order.rows_by_centre(c)}
    x, w, bias = torch.randn(33, 63), torch.randn(c.nnz), torch.randn(210)
    for somas, order in orders.items():
        assert order is not None
        topology = cpp._bind(c)
        topology.set_order(*order)
        with pytest.raises(ValueError, match=r"Expected an order of .*, got one of"):
            topology.forward(x, w, None, None if somas else bias, None, 0.1, 0.1, False)


@needs_extension
def test_what_was_not_accepted_is_refused() -> None:
    """`Topology.forward` is asked only after `accepts`, and checks all the same."""
    topology = cpp._topology(network())
    x, w = torch.randn(33, 30), torch.randn(240)
    assert topology.forward(x, w, None, None, None, 0.1, 0.1, False).shape == (33, 40)
    for bad in (x[0], x.bfloat16(), x[:, :29].contiguous(), x.T, None, [0.5]):
        with pytest.raises((TypeError, ValueError), match=r"Expected .*, got"):
            topology.forward(bad, w, None, None, None, 0.1, 0.1, False)
    with pytest.raises(ValueError, match="synapse_weight: Expected shape"):
        topology.forward(x, w[1:], None, None, None, 0.1, 0.1, True)


@needs_extension
def test_transposed_view_of_one_row_counts_as_contiguous() -> None:
    """Strides of a dimension of size 1, or of no elements, mean nothing."""
    c = network()
    layer = dk.DendriticLayer(c)
    row = torch.randn(30, 1).T
    assert torch.equal(layer(row), layer(row.clone()))
    assert layer(torch.empty(30, 0).T).shape == (0, 10)


@needs_extension
def test_extension_before_torch_is_configured_refuses_tensors() -> None:
    output(
        """
import torch
from dendrite_kernels import _cpu
import numpy as np
topology = _cpu.Topology(2, np.array([0, 1], np.int32), np.array([1], np.uint16),
                         np.array([0, 1], np.int32), 1)
x = torch.ones(1, 2)
try:
    _cpu.forward(topology, x, x[0, :1], None, None, None, 1.0, 1.0, False, x[:, :1], None, 1)
except TypeError as error:
    assert "Expected a torch.Tensor" in str(error)
else:
    raise AssertionError("computed without a pool")
assert topology.accepts(x, x[0, :1], None, None, None) is None
"""
    )


@needs_extension
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("column", np.int32, "Expected plan columns as wide as the connectivity's, got another"),
        ("synapse", np.int32, "Expected slots as wide as synapses, got another width"),
        ("slot", np.int64, "slot: Expected contiguous uint16 or int32, got int64"),
        ("synapse", np.int16, "synapse: Expected contiguous uint16 or int32, got int16"),
    ],
)
def test_a_plan_of_other_widths_is_refused(
    name: str, dtype: type[np.signedinteger[Any]], message: str
) -> None:
    c = dk.connectivity.random(20, 3, 4, 5, seed=0)
    plan = c.transposed
    topology = cpp._bind(c)
    arrays = {field: getattr(plan, field) for field in PLAN_ARRAYS}
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(TypeError, match=message):
        topology.set_transposed(plan.block_rows, plan.group, *arrays.values())


@needs_extension
def test_an_order_of_another_width_is_refused() -> None:
    c = dk.connectivity.local_receptive_fields((16, 12), 80, 5, 16, seed=0)
    order = _order.by_centre(c)
    assert order is not None
    topology = cpp._bind(c)
    with pytest.raises(TypeError, match="Expected columns as wide as the connectivity's, got"):
        topology.set_order(*order._replace(columns=order.columns.astype(np.int32)))
