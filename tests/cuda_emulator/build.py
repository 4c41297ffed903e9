"""Compiles csrc/cuda for the host emulator, with sanitizers, into build/cuda_emulator.

Object files are kept and used again for the same sources and flags. A mutant is the same code with
one piece of text replaced: the checks must detect it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_emulator"
MODULE = "_cuda_emulated"
COMMON = ["-std=c++17", "-fPIC", "-DDK_EMULATE", f"-DDK_MODULE={MODULE}", "-fno-strict-aliasing"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
# Without sanitizers the binding compiles in a third of the time; other tests check it.
FLAGS = {".cu": ["-O0", "-g1", *SANITIZE, "-Wno-unknown-pragmas", "-x", "c++"], ".cpp": ["-O0"]}


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    for name in ("libasan.so", "libubsan.so"):
        if not Path(runtime(name)).is_absolute():
            return f"g++ has no {name}"
    return None


def runtime(name: str) -> str:
    """Path of a library of the compiler, for LD_PRELOAD."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(replace: tuple[str, str, str] | None = None, sanitize: bool = True) -> Path:
    """Path of the emulator module; `replace` = (header in csrc/cuda, text, new text): a mutant.

    Without the sanitizers it is fast, and any process can load it.
    """
    sources = SOURCES
    if replace is not None:
        sources = OUTPUT / "mutants" / _digest(repr(replace).encode())
        shutil.copytree(SOURCES, sources, dirs_exist_ok=True)
        header, old, new = replace
        text = (SOURCES / "cuda" / header).read_text()
        assert text.count(old) == 1, f"{header}: expected {old!r} once, got {text.count(old)}"
        (sources / "cuda" / header).write_text(text.replace(old, new))
    units = sorted([*(sources / "cuda").glob("*.cu"), sources / "cuda" / "bind.cpp"])
    if replace is not None:  # one dtype is enough
        units = [unit for unit in units if unit.name == "kernels_f32.cu"]
    with ThreadPoolExecutor(2) as pool:
        objects = {
            path.name: made
            for path, made in zip(
                units, pool.map(lambda unit: _compile(unit, sanitize), units), strict=True
            )
        }
    if replace is not None:
        rest = sorted([*(SOURCES / "cuda").glob("*.cu"), SOURCES / "cuda" / "bind.cpp"])
        objects = {path.name: _compile(path) for path in rest} | objects
    name = _digest(*(str(path).encode() for path in objects.values()))
    module = OUTPUT / name / f"{MODULE}.so"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        temporary = module.with_suffix(".tmp")
        link = ["g++", "-shared", *(SANITIZE[:1] if sanitize else []), "-o", str(temporary)]
        subprocess.run([*link, *(str(path) for path in objects.values())], check=True)
        temporary.replace(module)
    return module


def _compile(source: Path, sanitize: bool = True) -> Path:
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(Path(__file__).parent)]
    headers = sorted(
        [
            *source.parent.glob("*.h"),
            *source.parent.glob("*.inl"),
            SOURCES / "cpu" / "tensor.h",
            Path(__file__).with_name("emulator.h"),
        ]
    )
    flags = FLAGS[source.suffix]
    if not sanitize:
        flags = ["-O1", *(flag for flag in flags if flag not in ("-O0", *SANITIZE))]
    command = ["g++", *COMMON, *flags, *(f"-I{path}" for path in includes)]
    content = [path.read_bytes() for path in [source, *headers]]
    made = OUTPUT / f"{source.stem}-{_digest(repr(command).encode(), *content)}.o"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_suffix(".tmp")
        subprocess.run([*command, "-c", str(source), "-o", str(temporary)], check=True)
        temporary.replace(made)
    return made


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
