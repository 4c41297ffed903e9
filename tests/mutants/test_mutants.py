"""The table of mutants fits the sources, and what tests say of one is understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package import sources

from .__main__ import MUTANTS, every_test
from .plant import Mutant, planted, run_tests

needs_sources = pytest.mark.skipif(sources.missing() is not None, reason=f"{sources.missing()}")


@needs_sources
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_can_still_be_planted(name: str) -> None:
    mutant = MUTANTS[name]
    assert mutant.new != mutant.old
    text = (sources.ROOT / mutant.file).read_text()
    changed = planted(mutant, text)  # if the text occurs exactly once
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")


@needs_sources
def test_the_tests_that_should_notice_are_there() -> None:
    for test in every_test(MUTANTS):
        file, _, function = test.partition("::")
        assert f"def {function}" in (sources.ROOT / file).read_text(), test


def test_no_two_mutants_are_the_same() -> None:
    assert len({(m.file, m.old, m.new) for m in MUTANTS.values()}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("def test(): assert 1 + 1 == 2", "passed"),
        ("def test(): assert 1 + 1 == 3", "failed"),
        ("import no_such_module\ndef test(): assert 0", "broken"),
        ("def test(no_such_fixture): assert 0", "broken"),
        ("import os\ndef test(): os.abort()", "broken"),
        ("import time\ndef test(): time.sleep(600)", "broken"),
        ("import pytest\ndef test(): pytest.skip()", "broken"),
        ("x = 1", "broken"),
    ],
    ids=["passes", "fails", "import", "fixture", "crash", "time", "skipped", "none"],
)
def test_only_a_failed_test_is_one(text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "outcome.xml").write_text('<x><testsuite tests="1"/></x>')  # of an earlier run
    (tmp_path / "test_one.py").write_text(text + "\n")
    found = run_tests(tmp_path, ["test_one.py"], limit=2 if "sleep" in text else 600)
    assert found.kind == kind, found.reason


def test_a_text_that_is_gone_or_ambiguous_is_an_error() -> None:
    for text in ("", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match=r"Expected 'a = 1' once in f\.py, got it"):
            planted(Mutant("f.py", "a = 1", "a = 2", "test_f.py"), text)
