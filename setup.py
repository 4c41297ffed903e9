"""Builds the optional extension modules; pyproject.toml holds everything else.

An extension that cannot be built (no compiler) is left out and the package works without it;
`dendrite_kernels.backend_info()` then says so. DENDRITE_KERNELS_REQUIRE=cpu,cuda makes it an error.
A copy of the repository that lacks a source is an error in any case.

The CUDA extension takes nvcc minutes for all kinds of GPU, so by default (auto) it is built where
nvcc and a GPU are found, for that GPU. DENDRITE_KERNELS_CUDA=1 builds it wherever there is nvcc,
for all of ARCHS where there is no GPU; 0 never builds it. DENDRITE_KERNELS_CUDA_ARCHS="90;120"
names others. nvcc is that of CUDA_HOME or CUDA_PATH, or the one on PATH.

As many compilers run at a time as there are cores; MAX_JOBS says otherwise.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REQUIRED = set(filter(None, os.environ.get("DENDRITE_KERNELS_REQUIRE", "").split(",")))
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-ffp-contract=fast",
]
# Kernels need no floating-point traps; NaN and infinity keep their meaning. They say themselves
# what is a vector: GCC would compute pairs of addresses in one, which takes longer.
KERNEL_FLAGS = ["-fno-trapping-math", "-fno-math-errno", "-fno-tree-slp-vectorize"]
X86_UNITS = ["kernels_base.cpp", "kernels_avx2.cpp", "kernels_avx512.cpp"]
ARM_UNITS = ["kernels_base.cpp", "kernels_neon.cpp"]
UNITS = {"x86_64": X86_UNITS, "amd64": X86_UNITS, "aarch64": ARM_UNITS, "arm64": ARM_UNITS}
MACHINE = platform.machine().lower()
ISA_FLAGS = {  # the more a unit takes to compile, the later
    # Few machines run these where there are others: not worth the minutes of -O3.
    "kernels_base.cpp": ["-O1"] if MACHINE in UNITS else [],
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
    # Scheduled before registers are given out, loads run so far ahead that accumulators spill.
    "kernels_neon.cpp": ["-fno-schedule-insns"],
}
BIND_FLAGS = ["-O1"]
LONGEST_FIRST = [*reversed(ISA_FLAGS), "bind.cpp"]
CPU, CUDA = Path("csrc", "cpu"), Path("csrc", "cuda")
CUDA_UNITS = [*(f"kernels_{dtype}.cu" for dtype in ("bf16", "f16", "f32", "f64")), "bind.cpp"]
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
EMULATOR = "emulator.h"  # of the tests, which alone compile what includes it
ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class BuildOptional(build_ext):
    """Compiles every source with flags of its own; records why an extension is missing."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.left_out: list[Extension] = []

    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "msvc":
            self.give_every_source_its_flags()
        for extension in list(self.extensions):
            try:
                self.build_extension(extension)
            except Exception as error:
                if extension.name.rsplit("_", 1)[1] in REQUIRED:
                    raise
                self.extensions.remove(extension)
                self.left_out.append(extension)
                remove_stale(Path(self.build_lib, self.get_ext_filename(extension.name)))
                print(f"{extension.name} was not built: {error}", file=sys.stderr)

    def give_every_source_its_flags(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            name = os.path.basename(src)
            own = KERNEL_FLAGS + ISA_FLAGS[name] if name in ISA_FLAGS else BIND_FLAGS
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *own], pp_opts)

        self.compiler._compile = compile_with_flags
        self.compiler.compile = in_parallel(self.compiler.compile)

    def build_extension(self, extension: Extension) -> None:
        if extension.name.endswith("._cuda"):
            build_cuda(
                extension, Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp)
            )
        elif self.compiler.compiler_type == "msvc":
            raise RuntimeError(
                "Expected GCC or Clang, whose vector types the kernels use, got MSVC"
            )
        else:
            super().build_extension(extension)

    def copy_extensions_to_source(self) -> None:  # editable install: only what was built
        for extension in self.left_out:
            remove_stale(Path(self.get_ext_filename(extension.name)))
        built = Path(self.build_lib)
        self.extensions = [
            e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class BuildPython(build_py):
    """Without modules that an earlier build left and that are gone since."""

    def run(self) -> None:
        for path in Path(self.build_lib, "dendrite_kernels").rglob("*.py"):
            path.unlink()
        super().run()


def remove_stale(extension: Path) -> None:
    """Removes what an earlier build made: it would be used as if it came from these sources."""
    if extension.exists():
        extension.unlink()
        print(f"removed {extension}, which an earlier build made", file=sys.stderr)


def in_parallel(compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The same for many sources at a time, each of which is handed over by itself."""

    def compile_sources(sources: list[str], **options: Any) -> list[str]:
        order = sorted(sources, key=lambda source: LONGEST_FIRST.index(os.path.basename(source)))
        with ThreadPoolExecutor(JOBS) as pool:
            made = pool.map(lambda source: compile_all([source], **options), order)
            return [path for paths in made for path in paths]

    return compile_sources


def absent_sources() -> list[str]:
    """The sources for every machine, and what they include, that are not there."""
    found: set[Path] = set()
    todo = [CPU / name for name in {*X86_UNITS, *ARM_UNITS, "bind.cpp"}]
    todo += [CUDA / name for name in CUDA_UNITS]
    while todo:
        path = Path(os.path.normpath(todo.pop()))
        if path not in found and path.exists():
            included = INCLUDE.findall(path.read_text(encoding="utf-8"))
            todo += [path.parent / name for name in included if name != EMULATOR]
        found.add(path)
    return sorted(str(path) for path in found if not path.exists())


def headers(folder: Path) -> list[str]:
    return sorted(str(path) for end in ("h", "inl") for path in folder.glob(f"*.{end}"))


def cpu_extension() -> Extension:
    units = UNITS.get(MACHINE, ["kernels_base.cpp"])
    return Extension(
        "dendrite_kernels._cpu",
        sources=[str(CPU / name) for name in ["bind.cpp", *units]],
        depends=headers(CPU),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        language="c++",
    )


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    paths = [Path(home, "bin", "nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    paths += [Path(on_path)] if on_path else []
    paths.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in paths if path.exists()), None)


def output_of(*command: str) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def archs_of_this_machine() -> list[str]:
    """["90"] with an H100; empty without a GPU."""
    found = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted({line.strip().replace(".", "") for line in found.splitlines() if line.strip()})


def archs_to_build(nvcc: str) -> list[str]:
    """Those asked for, else those of this machine's GPUs, else all that nvcc knows."""
    asked = os.environ.get("DENDRITE_KERNELS_CUDA_ARCHS", "")
    if asked:
        return asked.replace(",", ";").split(";")
    known = output_of(nvcc, "--list-gpu-arch").replace("compute_", "").split()
    return archs_of_this_machine() or [arch for arch in ARCHS if arch in known]


def build_cuda(extension: Extension, target: Path, temporary: Path) -> None:
    """nvcc compiles and links, since it knows where its own headers and libraries are."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("Expected nvcc on PATH or in CUDA_HOME, got none")
    archs = archs_to_build(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for later GPUs
    if "compress-mode" in output_of(nvcc, "--help"):
        targets.append("--compress-mode=size")
    defines = ["-DDK_MODULE=_cuda", f'-DDK_CUDA_ARCHS="{";".join(archs)}"']
    includes = [f"-I{path}" for path in extension.include_dirs]
    temporary.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        made = str(temporary / (Path(source).name + ".o"))
        flags = targets if source.endswith(".cu") else [*includes, *defines]
        subprocess.run([nvcc, "-c", source, "-o", made, *NVCC_FLAGS, *flags], check=True)
        return made

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, extension.sources))
    # The runtime is linked in and its symbols kept private: torch brings another copy.
    link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-o", str(target)]
    subprocess.run([nvcc, *link, *objects], check=True)


def cuda_extension() -> Extension:
    return Extension(
        "dendrite_kernels._cuda",
        sources=[str(CUDA / name) for name in CUDA_UNITS],
        depends=headers(CUDA),
        include_dirs=[pybind11.get_include(), sysconfig.get_path("include")],
        language="c++",
    )


def wants_cuda() -> bool:
    wish = os.environ.get("DENDRITE_KERNELS_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"Expected DENDRITE_KERNELS_CUDA to be 0, 1 or auto, got {wish!r}")
    if wish == "1" or "cuda" in REQUIRED:
        return True
    return wish == "auto" and find_nvcc() is not None and bool(archs_of_this_machine())


if __name__ == "__main__":  # bench.gpu.build takes functions of this file
    absent = absent_sources()
    if absent:
        raise SystemExit(
            f"Expected all sources of the kernels, got a copy without {', '.join(absent)}"
        )
    setup(
        ext_modules=[cpu_extension(), *([cuda_extension()] if wants_cuda() else [])],
        cmdclass={"build_ext": BuildOptional, "build_py": BuildPython},
    )
