"""A small data set for tests of sweeps, and a run on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.paper.run import Run

RUN = Run("stripes", "dANN-R", dendrites=2, somas=4, synapses=4, epochs=3, batch=32, lr=0.01)


def trials(run: Run, count: int) -> list[Run]:
    return [replace(run, trial=t) for t in range(count)]


def save_stripes(folder: Path) -> None:
    """stripes.npz: images of 6 x 5 pixels with a bright row that tells the class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 300)
    x = rng.integers(0, 120, (300, 6, 5))
    x[np.arange(300), y] += 100
    arrays = {"x_train": x[:200], "x_test": x[200:], "y_train": y[:200], "y_test": y[200:]}
    images = {name: a.astype(np.uint8 if name[0] == "x" else int) for name, a in arrays.items()}
    np.savez(folder / "stripes.npz", **images)
