"""The sdist holds all that a checkout has; a copy that lacks a source is not built."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from setuptools import Distribution

import dendrite_kernels as dk
from tests.cpu_kernels import build
from tests.package import sources

pytestmark = pytest.mark.skipif(sources.missing() is not None, reason=f"{sources.missing()}")

# Only a checkout uses these.
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
ADDED = ("PKG-INFO", "setup.cfg", "dendrite_kernels.egg-info/")
# Without git the files here are all there is to compare with.
NEEDED = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile",
    "README.md", "bench/page.css", "bench/results/cpu.json", "bench/speed/roofline.cpp",
    "constraints.txt", "csrc/cpu/kernels_neon.cpp", "csrc/cpu/kernels.h", "csrc/cpu/table.inl",
    "csrc/cuda/kernels_bf16.cu", "csrc/cuda/launch.inl", "dendrite_kernels/py.typed",
    "docs/equations.md", "pyproject.toml", "setup.py", "tests/conftest.py",
    "tests/cpu_kernels/check.cpp", "tests/cuda_emulator/budget.json",
    "tests/cuda_emulator/emulator.h", "tests/oracle.py",
}  # fmt: skip
SOURCES = ("cpu/kernels_neon.cpp", "cpu/tile.h", "cpu/table.inl", "cuda/kernels_f16.cu")
ARM_COMPILER = f"{build.PREFIX}g++"
EXTENSION = f"dendrite_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_the_sdist_holds_every_file(tmp_path: Path) -> None:
    done = sources.setup(sources.copy(tmp_path / "copy"), "-q", "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stdout
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert held >= NEEDED
    own = {name for name in held if not name.startswith(ADDED)}
    expected = {name for name in sources.files() if not name.startswith((*LEFT_OUT, *ADDED))}
    assert own == expected


def test_all_files_name_the_same_version() -> None:
    for name, line in (("pyproject.toml", 'version = "{}"'), ("CITATION.cff", "version: {}")):
        lines = (sources.ROOT / name).read_text().splitlines()
        assert line.format(dk.__version__) in lines, name


@pytest.mark.parametrize("name", SOURCES)
def test_a_copy_without_a_source_is_not_built(name: str, tmp_path: Path) -> None:
    shutil.copy(sources.ROOT / "setup.py", tmp_path)
    shutil.copytree(sources.ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / name).unlink()
    done = sources.setup(tmp_path, "build", DENDRITE_KERNELS_REQUIRE="")
    assert done.returncode != 0
    message = f"Expected all sources of the kernels, got a copy without {Path('csrc', name)}"
    assert done.stdout.splitlines()[-1] == message


def test_a_failed_build_leaves_no_earlier_extension(tmp_path: Path) -> None:
    copy = sources.copy(tmp_path)
    places = [copy / EXTENSION, copy / "build" / "lib" / EXTENSION]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("made earlier")
    command = "build_ext", "--inplace", "--force", "--build-lib", str(Path("build", "lib"))
    required = sources.setup(
        copy, *command, CC="false", CXX="false", DENDRITE_KERNELS_REQUIRE="cpu"
    )
    assert required.returncode != 0
    done = sources.setup(copy, *command, CC="false", CXX="false", DENDRITE_KERNELS_REQUIRE="")
    assert done.returncode == 0, done.stdout
    assert "dendrite_kernels._cpu was not built: " in done.stdout
    for place in places:
        assert not place.exists()
        assert f"removed {place.relative_to(copy)}, which an earlier build made" in done.stdout


def test_a_module_that_is_gone_is_not_built_again(tmp_path: Path) -> None:
    copy = sources.copy(tmp_path)
    built = copy / "build" / "lib" / "dendrite_kernels"
    built.mkdir(parents=True)
    (built / "gone.py").touch()
    done = sources.setup(copy, "build_py", "--build-lib", str(Path("build", "lib")))
    assert done.returncode == 0, done.stdout
    assert not (built / "gone.py").exists()
    assert (built / "nn.py").exists()


def test_msvc_leaves_the_kernels_out_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constants: dict[str, Any] = build.setup_constants()
    command = constants["BuildOptional"](
        Distribution({"ext_modules": [constants["cpu_extension"]()]})
    )
    command.build_lib = str(tmp_path)
    command.finalize_options()
    command.compiler = SimpleNamespace(compiler_type="msvc")
    constants["REQUIRED"].clear()
    command.build_extensions()
    assert command.extensions == []
    assert "_cpu was not built: Expected GCC or Clang, whose vector" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=f"no {ARM_COMPILER} on PATH")
def test_the_sources_are_cpp_for_arm_too() -> None:
    setup = build.setup_constants()
    for unit in setup["ARM_UNITS"]:
        command = [ARM_COMPILER, "-fsyntax-only", *setup["FLAGS"], *setup["KERNEL_FLAGS"]]
        command += [*setup["ISA_FLAGS"][unit], "-Werror", str(build.SOURCES / unit)]
        subprocess.run(command, check=True)
