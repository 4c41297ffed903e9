"""Builds the emulator module with the kernels that nvcc made, translated from PTX.

Beside them it holds the launchers of csrc/cuda, compiled for the host. These take a kernel by its
mangled name, and for that the linker finds the translated one first: csrc knows nothing of it.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda_emulator import build as emulator
from tests.cuda_emulator.ptx.translate import translate
from tests.cuda_emulator.resources import nvcc_version

HERE = Path(__file__).parent
ARCH = "compute_90"
NVCC = ["nvcc", "-ptx", f"-arch={ARCH}", "-O3", "-std=c++17"]
DTYPES = ("f32", "f64", "bf16", "f16")
# Sums and products must round as on the device, and integers wrap around.
TRANSLATED = ["-O1", "-w", "-fwrapv", "-ffp-contract=off"]


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    absent = [program for program in ("nvcc", "g++") if shutil.which(program) is None]
    return f"no {absent[0]} on PATH" if absent else None


def build(replace: tuple[str, str, str] | None = None) -> Path:
    """Path of the module; `replace` = (header in csrc/cuda, text, new text): a float32 mutant."""
    folders = dict.fromkeys(DTYPES, emulator.SOURCES / "cuda")
    if replace is not None:
        folders["f32"] = emulator.mutated(*replace) / "cuda"
    units = [folder / f"kernels_{dtype}.cu" for dtype, folder in folders.items()]
    with ThreadPoolExecutor(2) as pool:
        translated = pool.map(kernels, units)
        hosts = pool.map(_host, [*units, emulator.SOURCES / "cuda" / "bind.cpp"])
        return emulator.link([*translated, _runtime(), *hosts], [])


def build_alone(unit: Path) -> Path:
    """Path of a library with the kernels of a unit outside of csrc, for `ptx_launch`."""
    return emulator.link([kernels(unit), _runtime()], [])


def link_alone(source: Path) -> Path:
    """The same from translated PTX."""
    return emulator.link([_compile(source, TRANSLATED), _runtime()], [])


def kernels(unit: Path) -> Path:
    """The object with the translated kernels of a unit."""
    source = ptx(unit)
    translator = (path.read_bytes() for path in sorted(HERE.glob("*.py")))
    made = source.with_suffix(f".{emulator.digest(*translator)}.cpp")
    if not made.exists():
        made.write_text(translate(source.read_text()))
    return _compile(made, TRANSLATED)


def ptx(unit: Path) -> Path:
    """What nvcc makes of a unit."""
    inputs = [unit, *emulator.headers(unit.parent)]
    name = f"{unit.stem}-{nvcc_version().replace('.', '_')}.ptx"
    return emulator.kept(name, [*NVCC, str(unit)], inputs)


def _runtime() -> Path:
    return _compile(HERE / "runtime.cpp", ["-O2"])


def _host(source: Path) -> Path:
    return _compile(source, ["-O0", "-Wno-unknown-pragmas", "-x", "c++"])


def _compile(source: Path, flags: list[str]) -> Path:
    command = ["g++", *emulator.COMMON, *flags, *emulator.includes(), f"-I{HERE}"]
    headers = [*emulator.headers(source.parent), *sorted(HERE.glob("*.h"))]
    name = source.stem.partition(".")[0]
    return emulator.kept(f"{name}.o", [*command, "-c", str(source)], [source, *headers])
