"""The package from outside: its modules after one import, and what a type checker says."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dendrite_kernels as dk
from tests.processes import PACKAGE, output

USER = """
import torch
import dendrite_kernels as dk

c = dk.connectivity.random(784, 8, 4, 16, seed=0)
layer = dk.DendriticLayer(c, activation="relu", precision="bf16")
model = dk.models.build("dANN-R", (28, 28), 8, 4, 16, 10)
again: dk.DendriticLayer = dk.DendriticLayer.from_state_dict(layer.state_dict(), activation="relu")
total: int = dk.estimate_memory(c, 3).total
step = dk.optim.StepInBackward(layer.parameters(), lambda p: torch.optim.SGD(p, lr=0.1))
shard: dk.parallel.ShardSomas = dk.parallel.ShardSomas()
"""
TYPOS = {
    'dk.DendriticLayer(c, activation="rellu")': "rellu",
    'dk.DendriticLayer(c, precision="bf61")': "bf61",
    'dk.DendriticLayer.from_state_dict(layer.state_dict(), activation="rellu")': "rellu",
    "dk.SparseLinear.from_state_dict({}, negative_slop=0.2)": "negative_slop",
    'dk.models.build("dANN-LFR", (28, 28), 8, 4, 16, 10)': "dANN-LFR",
    'dk.estimate_memory(c, 4, "adma")': "adma",
    'dk.use_backend("nummba")': "nummba",
    "dk.nonsense": "nonsense",
}


def test_every_public_module_is_there_after_one_import() -> None:
    output(
        """
import sys, dendrite_kernels as dk
assert "dendrite_kernels.parallel" not in sys.modules
assert dk.optim.StepInBackward and dk.parallel.ShardSomas
for name in dk.__all__:
    assert getattr(dk, name) is not None, name
try:
    dk.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError("any name is an attribute")
"""
    )


def test_the_package_can_be_reloaded() -> None:
    output(
        """
import importlib, torch, dendrite_kernels as dk
layer, x = dk.DendriticLayer(dk.connectivity.random(9, 2, 2, 3, seed=0)), torch.randn(4, 9)
before = layer(x)
assert importlib.reload(dk) is dk and dk.SparseLinear
assert isinstance(layer, dk.DendriticLayer) and torch.equal(layer(x), before)
"""
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_finds_typos_in_a_users_file(tmp_path: Path) -> None:
    lines = [*USER.strip().split("\n"), *TYPOS]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(TYPOS), done.stdout
    for number, (error, typo) in enumerate(zip(errors, TYPOS.values(), strict=True)):
        assert error.startswith(f"user.py:{len(lines) - len(TYPOS) + number + 1}: "), error
        assert typo in error


def test_typos_are_refused_when_run() -> None:
    c = dk.connectivity.random(9, 2, 2, 3, seed=0)
    with pytest.raises(ValueError, match="got 'rellu'"):
        dk.DendriticLayer(c, activation="rellu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'dANN-LFR'"):
        dk.models.build("dANN-LFR", (3, 3), 2, 2, 3, 2)  # type: ignore[arg-type]
