"""`make benchmark-compare`: two versions in two processes, and when one of them is slower."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import dendrite_kernels as dk
from bench.speed import compare

PACKAGE = Path(dk.__file__).parent


def _version(folder: Path, loops: int) -> Path:
    """A copy of the package whose layer first counts to `loops`."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / PACKAGE.name / "nn.py"
    text = module.read_text()
    head = "class DendriticLayer"
    assert text.count(head) == 1
    count = f"def _count(*_: object) -> None:\n    for _ in range({loops}):\n        pass\n\n\n"
    hook = "\n\nDendriticLayer.__call__ = lambda self, x: (_count(), self.forward(x))[1]\n"
    module.write_text(text.replace(head, count + head) + hook)
    return folder


def test_slower_in_every_pair() -> None:
    assert compare.slower([1.06, 1.3], 0.05)
    assert not compare.slower([1.04, 1.3], 0.05)
    assert not compare.slower([0.5, 0.6], 0.05)


def test_a_worker_refuses_another_version(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it times must be the package of its folder, not one that is installed."""
    worker = compare.Worker(tmp_path, "numba", 1)
    with pytest.raises(RuntimeError, match="got an end: see its error above"):
        worker.prepare("E1 forward")
    worker.close()
    assert f"Expected the package in {tmp_path.resolve()}" in capfd.readouterr().err


@pytest.mark.slow
def test_a_planted_slowdown_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loop that takes many times as long as the call itself."""
    base, new = _version(tmp_path / "base", 0), _version(tmp_path / "new", 100_000)
    options = compare._parse(
        ["main", "--tasks", "E1 forward", "--pairs", "2", "--turns", "4", "--threads", "1"]
    )
    assert compare.compare(base, new, options) == ["E1 forward"]
    assert "SLOWER" in capsys.readouterr().out
    assert compare.compare(new, base, options) == []
