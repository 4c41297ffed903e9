"""The Numba backend in several processes: forks, the cache of compiled code, no place to write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.backends.test_numba_backend import kernels
from tests.processes import copy_package, output

pytestmark = pytest.mark.skipif(
    kernels.unavailable() is not None, reason=f"numba: {kernels.unavailable()}"
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_workers_compute() -> None:
    """With what the parent compiled, and what they compile themselves."""
    output(
        """
import multiprocessing, torch
from tests.backends import test_numba_backend as t
torch.set_num_threads(2)
def work(case):
    name, dtype = case
    c = t.NETWORKS[name]()
    assert t.kernels.info()["threads"] == 1
    return [result.numpy() for result in t.run(c, t.draw(c, dtype=dtype))]
expected = {}
for name, make in t.NETWORKS.items():
    expected[name, "float32"] = t.run(c := make(), t.draw(c))
with multiprocessing.get_context("fork").Pool(2) as pool:
    cases = [*expected, *((name, "float64") for name in t.NETWORKS)]
    found = dict(zip(cases, pool.map_async(work, cases).get(timeout=500)))
for (name, dtype), results in found.items():
    expected.setdefault((name, dtype), t.run(c := t.NETWORKS[name](), t.draw(c, dtype=dtype)))
    results = map(torch.from_numpy, results)
    assert all(map(t.equal, results, expected[name, dtype])), (name, dtype)
""",
    )


LOADS = """
import torch
from tests.backends import test_numba_backend as t
from dendrite_kernels.backends.numba import tasks
torch.set_num_threads(1)
c = t.NETWORKS["ragged"]()
a = t.draw(c)
u = t.sparse(c, a["x"], a["synapse_weight"])
matrix = c.to_scipy(a["synapse_weight"])
assert t.equal(u, torch.from_numpy(a["x"].numpy() @ matrix.T))
functions = tasks._compiled.values()
print(sum(f.cache_hits for f in functions), "of", len(functions), tasks.cache_state())
"""


def test_later_processes_load_what_the_first_compiled(tmp_path: Path) -> None:
    """Until a source changes, also one that Numba's cache does not look at."""
    package, cache = copy_package(tmp_path), str(tmp_path / "cache")
    assert output(LOADS, package, NUMBA_CACHE_DIR=cache) == "0 of 1 on\n"
    assert output(LOADS, package, NUMBA_CACHE_DIR=cache) == "1 of 1 on\n"
    with (package / "backends" / "numba" / "vectors.py").open("a") as file:
        file.write("# changed\n")
    assert output(LOADS, package, NUMBA_CACHE_DIR=cache) == "0 of 1 on\n"


def test_nothing_can_be_written(tmp_path: Path) -> None:
    """A read-only installation and no home: compiled without the cache, and said so. Files in
    the place of folders stop even root, whom permissions do not.
    """
    package = copy_package(tmp_path)
    for folder in [package, package / "backends", package / "backends" / "numba"]:
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        (folder / "__pycache__").touch()
    nowhere = tmp_path / "a file"
    nowhere.touch()
    folders = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(nowhere / "cache"))
    for path in [*package.rglob("*"), package, tmp_path]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        printed = output(LOADS, package, NUMBA_CACHE_DIR="", **folders)
        assert printed.startswith("0 of 1 off: "), printed
        assert "no locator available" in printed
    finally:
        for path in [tmp_path, package, *package.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
