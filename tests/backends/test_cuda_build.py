"""The CUDA extension without a GPU: what nvcc makes of it, and what the package says without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import backends
from dendrite_kernels.backends import cuda
from tests.cuda_emulator import resources, sass

ROOT = Path(__file__).parents[2]
NO_NVCC = resources.missing()
NO_NVDISASM = NO_NVCC or (None if resources.nvdisasm() else "no nvdisasm (nvidia-cuda-nvdisasm)")
needs_nvcc = pytest.mark.skipif(NO_NVCC is not None, reason=f"{NO_NVCC}")
needs_nvdisasm = pytest.mark.skipif(NO_NVDISASM is not None, reason=f"{NO_NVDISASM}")


def test_a_cuda_tensor_without_the_extension_gets_an_error_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dendrite_kernels._cuda", None)  # the import fails
    monkeypatch.delattr(dk, "_cuda", raising=False)
    monkeypatch.setattr(cuda._extension, "is_built", lambda name: False)
    monkeypatch.setattr(backends, "_selected", {})
    cuda._load.cache_clear()
    try:
        with pytest.raises(dk.BackendUnavailable) as caught:
            backends.select(torch.device("cuda"))
    finally:
        cuda._load.cache_clear()
    for word in ("_cuda was not built", "nvcc", "DENDRITE_KERNELS_REQUIRE=cuda", "CPU"):
        assert word in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_info_says_why_cuda_is_not_available() -> None:
    entry = dk.backend_info()["cuda"]
    assert not entry["available"]
    assert entry["reason"]


def check_use(found: dict[str, dict[str, resources.Use]]) -> None:
    budget = json.loads(resources.BUDGET.read_text())
    same_compiler = budget["nvcc"] == resources.nvcc_version()
    for kernel, uses in found.items():
        for arch, use in uses.items():
            assert use.spills == 0, f"{kernel} spills on sm_{arch}: {use}"
            assert use.stack == 0, f"{kernel} uses the stack on sm_{arch}: {use}"
            limit = budget["registers"][kernel][budget["archs"].index(arch)]
            # Another compiler may count otherwise; it must not exceed what 512 threads can have.
            assert use.registers <= (limit if same_compiler else 128), (kernel, arch, use)


@needs_nvcc
def test_float_kernels_keep_within_their_budget_on_hopper() -> None:
    found = resources.measure(("90",), ("f32",))
    assert len(found) > 20
    check_use(found)


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_keeps_within_its_budget_on_every_arch() -> None:
    found = resources.measure()
    assert set(found) == set(json.loads(resources.BUDGET.read_text())["registers"])
    assert {len(uses) for uses in found.values()} == {len(resources.ARCHS)}
    check_use(found)


@needs_nvdisasm
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch"), [("f32", "80"), ("f32", "90"), ("bf16", "90")])
def test_machine_code_gathers_by_wide_loads(dtype: str, arch: str) -> None:
    counts = resources.census(dtype, arch)
    for kernel, found in counts.items():
        local = [name for name in found if re.match(r"(LDL|STL)", name)]
        assert not local, (kernel, found)
        if not kernel.startswith(("forward_tile", "backward_weight", "backward_input")):
            continue
        if "shared" in kernel:
            assert found["LDS.64"] >= 4, (kernel, found)
        if re.search(r"Kind<(float, 2|bf16, 4), 1, shared>", kernel):
            assert found["PRMT"] >= 8, (kernel, found)  # one makes an address
        # Eight indices, or four weights, by one load.
        assert any(re.match(r"LDG\.E\.(64|128)", name) for name in found), (kernel, found)


@needs_nvdisasm
@pytest.mark.slow
def test_no_loop_takes_more_instructions_than_its_budget() -> None:
    budget = json.loads(resources.BUDGET.read_text())
    if budget["instructions_nvcc"] != resources.nvcc_version():
        pytest.skip(f"the budget is for nvcc {budget['instructions_nvcc']}")
    found = sass.budget()
    hint = "python -m tests.cuda_emulator.sass --update"
    assert set(found) == set(budget["instructions"]), hint
    for kernel, loops in found.items():
        limits = budget["instructions"][kernel]
        depths = [depth for depth, _ in limits]
        assert [depth for depth, _ in loops] == depths, f"{kernel} has other loops: {hint}"
        for (depth, count), (_, limit) in zip(loops, limits, strict=True):
            assert count <= limit, f"{kernel}, depth {depth}: {count} instructions, not {limit}"


@needs_nvcc
@pytest.mark.slow
def test_the_extension_builds_and_loads_beside_torch(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DENDRITE_KERNELS_REQUIRE": "cuda",
        "DENDRITE_KERNELS_CUDA_ARCHS": "90",
        "MAX_JOBS": "2",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    command += ["--build-temp", str(tmp_path / "temporary")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    script = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.configure(torch.Tensor.__dlpack_c_exchange_api__)
print(module.archs, module.runtime_version())
"""
    (built,) = (tmp_path / "dendrite_kernels").glob("_cuda.*")
    done = subprocess.run(
        [sys.executable, "-c", script, str(built)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("90 ")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(built)], capture_output=True, text=True, check=True
    )
    assert "cudaLaunchKernel" not in symbols.stdout  # torch's own runtime must not meet ours
