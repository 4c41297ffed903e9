"""`make wheel` refuses a wheel that lacks a file or brings a library."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dendrite_kernels.backends import cpp
from tests.package import wheel

EXTENSION = cpp._load()[0]
NAME = "dendrite_kernels/_cpu.cpython-311-x86_64-linux-gnu.so"
LICENSE = "dendrite_kernels-0.1.0.dist-info/licenses/LICENSE"
TYPED = "dendrite_kernels/py.typed"
pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason="_cpu was not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="wheels are checked on Linux"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing"),
]


@pytest.fixture
def contents() -> dict[str, bytes]:
    """The files of a wheel that the checks look for."""
    return {NAME: Path(EXTENSION.__file__).read_bytes(), TYPED: b"", LICENSE: b""}


def faults(folder: Path, contents: dict[str, bytes]) -> list[str]:
    made = folder / "made.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return wheel.faults(made)


def test_a_wheel_with_all_it_needs_has_no_fault(tmp_path: Path, contents: dict[str, bytes]) -> None:
    assert faults(tmp_path, contents) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NAME, "Expected the extension _cpu and no other library, got []"),
        (TYPED, "Expected a file dendrite_kernels/py.typed, got none"),
        (LICENSE, "Expected a file *.dist-info/licenses/LICENSE, got none"),
    ],
)
def test_a_wheel_without_a_file_is_refused(
    name: str, message: str, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    del contents[name]
    assert faults(tmp_path, contents) == [message]


def test_a_second_library_is_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    contents["dendrite_kernels.libs/libgomp-1.so.1.0.0"] = contents[NAME]
    (fault,) = faults(tmp_path, contents)
    assert "libgomp-1.so.1.0.0" in fault


def test_an_extension_that_needs_torch_is_refused(
    tmp_path: Path, contents: dict[str, bytes]
) -> None:
    contents[NAME] = Path(torch._C.__file__).read_bytes()
    (fault,) = faults(tmp_path, contents)
    assert "libtorch" in fault


def test_a_large_wheel_is_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    contents["dendrite_kernels/large"] = os.urandom(wheel.LARGEST)
    (fault,) = faults(tmp_path, contents)
    assert fault.startswith("Expected less than 2,000,000 bytes, got ")
