"""Registers, stack and spills of the CUDA kernels, as nvcc reports them without a GPU.

    python -m tests.cuda_emulator.resources --update   writes budget.json

The budget holds the registers of every kernel for every arch; no kernel may spill or use the stack.
Its "instructions" are those of sass.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
DTYPES = ("f32", "bf16", "f16", "f64")


@dataclass(frozen=True)
class Use:
    """Resources of one kernel on one arch; stack and spills in bytes."""

    registers: int
    stack: int
    spills: int


SIGNS = ("no signs", "staged signs", "distant signs")


def missing() -> str | None:
    return None if shutil.which("nvcc") else "no nvcc on PATH"


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def measure(
    archs: tuple[str, ...] = ARCHS, dtypes: tuple[str, ...] = DTYPES, jobs: int = 2
) -> dict[str, dict[str, Use]]:
    """Compile the kernels: {"f32 kernel<...>": {"90": use}}."""
    with ThreadPoolExecutor(jobs) as pool:
        reports = pool.map(lambda dtype: _compile(dtype, archs), dtypes)
        found: dict[str, dict[str, Use]] = {}
        for dtype, report in zip(dtypes, reports, strict=True):
            for name, arch, use in _parse(report):
                found.setdefault(f"{dtype} {name}", {})[arch] = use
    return found


def _compile(dtype: str, archs: tuple[str, ...]) -> str:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    source = str(ROOT / "csrc" / "cuda" / f"kernels_{dtype}.cu")
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-c", source, "-o", f"{folder}/a.o", "-O3", "-std=c++17", "-Xptxas=-v"]
        done = subprocess.run([*command, *targets], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stderr


def _parse(report: str) -> list[tuple[str, str, Use]]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    found = pattern.findall(report)
    names = _demangle([mangled for mangled, *_ in found])
    return [
        (name, arch, Use(int(registers), int(stack), int(stores) + int(loads)))
        for name, (_, arch, stack, stores, loads, registers) in zip(names, found, strict=True)
    ]


def _demangle(names: list[str]) -> list[str]:
    """_ZN2dk12forward_tileI... -> forward_tile<Kind<float, 2, 1, shared, 16-bit>>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in text.stdout.splitlines():
        line = re.sub(r"^void |dk::", "", line)
        line = re.sub(r"\(\w+(<.*)?\)$", "", line)  # parameters
        line = re.sub(r"true, unsigned short", "shared", line)
        line = re.sub(r"false, unsigned short", "l2", line)
        line = re.sub(r"false, int", "l2 32-bit", line)
        line = re.sub(r"\(Signs\)(\d)", lambda found: SIGNS[int(found[1])], line)
        short.append(line.replace("unsigned short", "16-bit").replace(" >", ">"))
    return short


def nvdisasm() -> str | None:
    """Path of nvdisasm: from PATH, or from a package of pip, nvidia-cuda-nvdisasm or triton."""
    places = ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm")
    found = (path for folder in sys.path for place in places for path in Path(folder).glob(place))
    return shutil.which("nvdisasm") or next((str(path) for path in found), None)


def machine_code(dtype: str, arch: str) -> dict[str, str]:
    """Machine code of each kernel as nvdisasm prints it."""
    text = _disassemble(dtype, arch).read_text()
    parts = re.split(r"\n\.text\.(\w+):", text)
    return dict(zip(_demangle(parts[1::2]), parts[2::2], strict=True))


def _disassemble(dtype: str, arch: str) -> Path:
    """File with the machine code of a unit; kept, and used again for the same sources and tools."""
    tool = nvdisasm()
    assert tool is not None
    source = ROOT / "csrc" / "cuda" / f"kernels_{dtype}.cu"
    command = ["nvcc", "-cubin", str(source), "-O3", "-std=c++17", f"-arch=sm_{arch}"]
    digest = hashlib.blake2b(repr([nvcc_version(), tool, command]).encode(), digest_size=8)
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(path.read_bytes())
    made = ROOT / "build" / "cuda_emulator" / f"{dtype}-{arch}-{digest.hexdigest()}.sass"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            cubin, text = Path(folder, "a.cubin"), Path(folder, "a.sass")
            subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True)
            done = subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True)
            text.write_bytes(done.stdout)
            text.replace(made)
    return made


def census(dtype: str, arch: str) -> dict[str, Counter[str]]:
    """How often each instruction is in the machine code of each kernel."""
    pattern = re.compile(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", re.M)
    code = machine_code(dtype, arch)
    return {name: Counter(pattern.findall(text)) for name, text in code.items()}


def write_budget(**sections: object) -> None:
    """Replaces these sections of budget.json; a kernel is one line."""
    everything = json.loads(BUDGET.read_text()) | sections
    texts = []
    for name, section in everything.items():
        text = json.dumps(section)
        if isinstance(section, dict):
            lines = (
                f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items()
            )
            text = "{\n" + ",\n".join(lines) + "\n  }"
        texts.append(f"  {json.dumps(name)}: {text}")
    BUDGET.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def main() -> None:
    if sys.argv[1:] != ["--update"]:
        raise SystemExit(__doc__)
    kernels = {
        name: [uses[arch].registers for arch in ARCHS] for name, uses in sorted(measure().items())
    }
    write_budget(nvcc=nvcc_version(), archs=ARCHS, registers=kernels)


if __name__ == "__main__":
    main()
