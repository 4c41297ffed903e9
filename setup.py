"""Builds the optional extension modules; pyproject.toml holds everything else.

An extension that cannot be built (no compiler) is left out and the package works without it;
`dendrite_kernels.backend_info()` then says so. DENDRITE_KERNELS_REQUIRE=cpu makes it an error.
"""

import os
import platform
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
# Kernels need no floating-point traps; NaN and infinity keep their meaning.
KERNEL_FLAGS = ["-fno-trapping-math", "-fno-math-errno"]
ISA_FLAGS = {
    "kernels_base.cpp": [],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildOptional(build_ext):
    """Compiles every source with the flags of its ISA; records why an extension is missing."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            name = os.path.basename(src)
            isa = KERNEL_FLAGS + ISA_FLAGS[name] if name in ISA_FLAGS else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *isa], pp_opts)

        self.compiler._compile = compile_with_isa
        for extension in list(self.extensions):
            room = extension.name.rsplit("_", 1)[1]
            try:
                self.build_extension(extension)
            except Exception as error:
                if room in REQUIRED:
                    raise
                self.extensions.remove(extension)
                print(f"{extension.name} was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:  # editable install: only what was built
        built = Path(self.build_lib)
        self.extensions = [
            e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def cpu_extension() -> Extension:
    room = Path("csrc", "cpu")
    isas = sorted(ISA_FLAGS) if IS_X86 else ["kernels_base.cpp"]
    return Extension(
        "dendrite_kernels._cpu",
        sources=[str(room / name) for name in ["bind.cpp", *isas]],
        depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in room.glob(pattern)),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        language="c++",
    )


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildOptional})
