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
CUDA = ["-Wno-unknown-pragmas", "-x", "c++"]
# Without sanitizers the binding compiles in a third of the time; other tests check it.
SANITIZED = {".cu": ["-O0", "-g1", *SANITIZE, *CUDA], ".cpp": ["-O0"]}
FAST = {".cu": ["-O1", "-g1", *CUDA], ".cpp": ["-O1"]}


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
    flags = SANITIZED if sanitize else FAST
    units = sorted([*(SOURCES / "cuda").glob("*.cu"), SOURCES / "cuda" / "bind.cpp"])
    if replace is not None:  # of one dtype, and first: the linker takes what several units define
        mutant = mutated(*replace) / "cuda" / "kernels_f32.cu"
        units = [mutant, *(unit for unit in units if unit.name != mutant.name)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda unit: _compile(unit, flags), units))
    return link(objects, SANITIZE[:1] if sanitize else [])


def mutated(header: str, old: str, new: str) -> Path:
    """Folder with a copy of csrc in which a piece of text is replaced."""
    sources = OUTPUT / "mutants" / digest(repr((header, old, new)).encode())
    shutil.copytree(SOURCES, sources, dirs_exist_ok=True)
    text = (SOURCES / "cuda" / header).read_text()
    assert text.count(old) == 1, f"{header}: expected {old!r} once, got {text.count(old)}"
    (sources / "cuda" / header).write_text(text.replace(old, new))
    return sources


def link(objects: list[Path], flags: list[str]) -> Path:
    """The module that these objects make, the first definition of a name first."""
    name = digest(*(str(path).encode() for path in objects))
    command = ["g++", "-shared", *flags, *(str(path) for path in objects)]
    return _once(OUTPUT / name / f"{MODULE}.so", command)


def kept(name: str, command: list[str], inputs: list[Path]) -> Path:
    """The file that a command with `-o` makes of its inputs: made once for the same contents."""
    content = [path.read_bytes() for path in inputs]
    stem, _, suffix = name.partition(".")
    return _once(OUTPUT / f"{stem}-{digest(repr(command).encode(), *content)}.{suffix}", command)


def _once(made: Path, command: list[str]) -> Path:
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_suffix(".tmp")
        subprocess.run([*command, "-o", str(temporary)], check=True)
        temporary.replace(made)
    return made


def headers(sources: Path) -> list[Path]:
    """Everything that the units in a folder include."""
    own = [*sources.glob("*.h"), *sources.glob("*.inl")]
    return sorted([*own, SOURCES / "cpu" / "tensor.h", Path(__file__).with_name("emulator.h")])


def includes() -> list[str]:
    paths = [pybind11.get_include(), sysconfig.get_path("include"), str(Path(__file__).parent)]
    return [f"-I{path}" for path in paths]


def _compile(source: Path, flags: dict[str, list[str]]) -> Path:
    command = ["g++", *COMMON, *flags[source.suffix], *includes(), "-c", str(source)]
    return kept(f"{source.stem}.o", command, [source, *headers(source.parent)])


def digest(*parts: bytes) -> str:
    hash_ = hashlib.blake2b(digest_size=8)
    for part in parts:
        hash_.update(part)
    return hash_.hexdigest()
