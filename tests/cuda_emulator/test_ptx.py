"""The CUDA kernels as nvcc made them, without a GPU: every access of every thread is checked."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_emulator.build import ROOT, SOURCES
from tests.cuda_emulator.ptx import build, vocabulary
from tests.cuda_emulator.ptx.calls import Library
from tests.cuda_emulator.ptx.parse import UnknownPtx, entries
from tests.cuda_emulator.ptx.translate import translate

REASON = build.missing()
needs_nvcc = pytest.mark.skipif(REASON is not None, reason=f"PTX: {REASON}")
NO_FAULTS = dict.fromkeys(("diverged", "misaligned", "outside", "race", "uninitialised"), 0)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which diverged threads end."""
    command = [sys.executable, "-m", f"tests.cuda_emulator.ptx.{script}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT,
        timeout=1200,
    )  # fmt: skip


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def kinds(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The kinds of faults that a process reported."""
    return set(re.findall(r"^PTX (\w+): .*: \w+$", done.stderr, re.M))


@pytest.mark.slow
@needs_nvcc
def test_every_entry_point_matches_the_oracle_without_a_fault() -> None:
    module = str(build.build())
    with ThreadPoolExecutor(2) as pool:
        parts = [["--cases", "all", "--part", f"{part}/2"] for part in range(2)]
        done = list(pool.map(lambda part: run("check", module, *part), parts))
    reports = [report(process) for process in done]
    for process, found in zip(done, reports, strict=True):
        assert not found["wrong"], "\n".join(found["wrong"][:20])
        assert found["faults"] == NO_FAULTS, process.stderr[-3000:]
        assert found["untranslated"] == 0, "launches that ran another kernel than nvcc's"
    launches = {name: sum(found["launches"][name] for found in reports)
                for name in reports[0]["launches"]}  # fmt: skip
    accesses = sum(found["accesses"] for found in reports)
    print(f"{len(launches)} entry points, {sum(launches.values())} launches, {accesses} bytes")
    assert {entry for unit in units() for entry in unit} == launches.keys()
    assert not [name for name, count in launches.items() if count == 0], "entry points never ran"


@pytest.mark.slow
@needs_nvcc
def test_an_entry_point_of_several_units_is_the_same_in_each() -> None:
    """So that it is enough to run it once."""
    texts: dict[str, set[str]] = {}
    for unit in units():
        for name, body in unit.items():
            texts.setdefault(name, set()).add(body)
    assert all(len(bodies) == 1 for bodies in texts.values())


def units() -> list[dict[str, str]]:
    """The text of every entry point of every unit, without numbers of labels."""
    sources = [SOURCES / "cuda" / f"kernels_{t}.cu" for t in build.DTYPES]
    texts = [re.sub(r"\$L__BB\d+_", "$L_", build.ptx(unit).read_text()) for unit in sources]
    return [{entry.name: entry.body for entry in entries(text)} for text in texts]


MUTANTS = {
    # Warps gather before the others have filled the tile.
    "no barrier": ("race", "forward.h", "    __syncthreads();\n", ""),
    # Wide loads begin at odd slots.
    "odd slot": ("misaligned", "tile.h", "return int64_t(step) * K::kStep + me",
                 "return int64_t(step) * K::kStep + 1 + me"),
    # Writes one row behind the tile.
    "overrun of the tile": ("outside", "tile.h", "if (tile_rows > inputs && me.warp == 0",
                            "if (me.warp == 0"),
    # Reads behind the last sample of x.
    "overrun of a tensor": ("outside", "tile.h",
                            "out[j] = n + j < inputs ? row[n + j] : T{};", "out[j] = row[n + j];"),
    # Every group of lanes stores the row of pads.
    "same store twice": ("race", "tile.h", " && me.group == 0)", ")"),
}  # fmt: skip


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    kind, *replace = MUTANTS[name]
    header, old, new = replace
    module = build.build((header, old, new))
    done = run("check", str(module), "--orders", "1")
    assert kind in kinds(done), done.stdout[-3000:] + done.stderr[-3000:]


PLANTED = Path(build.__file__).with_name("planted.cu")
NAMES = re.findall(r"^KERNEL\((\w+)\)", PLANTED.read_text(), re.M)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_bug_is_caught(name: str) -> None:
    """As the kind that the kernel is named after; one named `good` has none."""
    done = run("planted", str(build.build_alone(PLANTED)), name)
    kind = name.split("_")[0]
    if kind == "good":
        assert report(done)["faults"] == NO_FAULTS, done.stderr
    else:
        assert kind in kinds(done), done.stdout + done.stderr
        # What was read too early may not have been there yet.
        assert kinds(done) <= {kind, "uninitialised" if kind == "race" else kind}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    folder = tmp_path_factory.mktemp("ptx")
    source = folder / "operations.cpp"
    source.write_text(translate(vocabulary.program()))
    return Library(build.link_alone(source))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(vocabulary.OPERATIONS)))
def test_an_instruction_means_what_python_says(operations: Library, number: int) -> None:
    operation, threads = vocabulary.OPERATIONS[number], 256
    chance = random.Random(number)
    columns = [[vocabulary.draw(t, chance) for _ in range(threads)] for t in operation.operands]
    packed = [
        vocabulary.pack(t, column) for t, column in zip(operation.operands, columns, strict=True)
    ]
    size = threads * vocabulary.bits(operation.result) // 8
    buffers = [ctypes.create_string_buffer(data, len(data)) for data in [*packed, bytes(size)]]
    pointers = [ctypes.addressof(buffer) for buffer in buffers]
    operations.announce(
        (pointer, len(buffer)) for pointer, buffer in zip(pointers, buffers, strict=True)
    )
    places = [*pointers[:-1], *[0] * (5 - len(pointers)), pointers[-1]]
    operations.launch(f"operation_{number}", 1, threads, 0, struct.pack("5Q", *places))
    got = vocabulary.canonical(operation.result, buffers[-1].raw)
    want = vocabulary.expected(operation, columns)
    width = vocabulary.bits(operation.result) // 8
    wrong = [i for i in range(threads) if got[width * i :][:width] != want[width * i :][:width]]
    assert not wrong, [
        (operation.code, [column[i] for column in columns], got[width * i:][:width].hex(),
         want[width * i:][:width].hex()) for i in wrong[:3]
    ]  # fmt: skip


@pytest.mark.slow
@needs_nvcc
def test_the_vocabulary_is_ptx(tmp_path: Path) -> None:
    """As far as NVIDIA's assembler can tell."""
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas on PATH")
    source = tmp_path / "operations.ptx"
    source.write_text(vocabulary.program())
    arch = build.ARCH.replace("compute", "sm")
    subprocess.run(["ptxas", f"-arch={arch}", str(source), "-o", str(tmp_path / "a")], check=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("atom.global.add.u32 %r1, [%rd1], 1;", "instruction"),
        ("add.sat.s32 %r1, %r1, %r1;", "instruction"),
        ("add.s32 %r1, %r7, %r1;", "operand %r7"),
        ("ld.relaxed.gpu.global.u32 %r1, [%rd1];", "modifier relaxed"),
        ("bar.sync 1, 64;", "barrier"),
        ("cvt.rz.f32.f64 %f1, %fd1;", "rounding"),
        ("add.f16 %r1, %r1, %r1;", "instruction"),
    ],
)
def test_an_unknown_instruction_is_an_error_with_its_line(line: str, reason: str) -> None:
    body = [".reg .b32 %r<2>;", ".reg .b64 %rd<2>;", ".reg .f32 %f<2>;", ".reg .f64 %fd<2>;", line]
    text = ".visible .entry f(\n\t.param .align 8 .b8 f_param_0[24]\n)\n{\n" + "\n".join(body)
    with pytest.raises(UnknownPtx, match=rf"line 9: {re.escape(line[:-1])}: unknown {reason}"):
        translate(text + "\n\tret;\n}\n")
