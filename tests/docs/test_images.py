"""The drawings are those that docs/images/draw.py makes."""

from __future__ import annotations

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "images"


def test_drawings_are_up_to_date() -> None:
    drawings = runpy.run_path(str(FOLDER / "draw.py"))["DRAWINGS"]
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(drawings)
    for name, draw in drawings.items():
        assert (FOLDER / f"{name}.svg").read_text() == str(draw()), name
