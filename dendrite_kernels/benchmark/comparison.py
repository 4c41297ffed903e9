"""Several candidates on one problem: verified first, then timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from .peer import Peer
from .peers import PEERS, reason_to_skip
from .problem import TOLERANCES, Problem, largest_error
from .timing import Task, ratio, waiting_for


@dataclass
class Comparison:
    """What is timed on a problem, and what is not."""

    problem: Problem
    expected: Mapping[str, Tensor]  # the oracle's answer
    patience: float = math.inf  # seconds of a first call; what takes longer is not timed
    skipped: dict[str, str] = field(default_factory=dict)  # candidate -> why it was not run
    refused: dict[str, str] = field(default_factory=dict)  # candidate -> why its results are wrong
    errors: dict[str, float] = field(default_factory=dict)  # candidate -> largest relative L2
    tasks: dict[tuple[str, str, str], Task] = field(default_factory=dict)

    def admit(self, group: str, name: str, modes: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """Make a candidate, check its results in every mode, and only then plan to time it.

        A candidate has `run(mode)` and `results(mode)`. Returns it, or None if it was not admitted.
        """
        try:
            candidate = make()
            surroundings = getattr(candidate, "surroundings", nullcontext)
            errors = {}
            for mode in modes:
                started = time.perf_counter()
                with surroundings():
                    results = candidate.results(mode)
                seconds = time.perf_counter() - started
                errors[mode] = largest_error(results, self.expected)
                if seconds > self.patience:
                    self.skipped[name] = f"{mode} took {seconds:.0f} s, more than {self.patience:g}"
                    return None
        except Exception as error:  # whatever a candidate raises is the reason not to time it
            self.refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        tolerance = TOLERANCES[self.problem.x.dtype]
        wrong = [f"{mode}: {error:.1e}" for mode, error in errors.items() if not error <= tolerance]
        if wrong:
            self.refused[name] = f"relative error more than {tolerance:.0e}: {', '.join(wrong)}"
            return None
        self.errors[name] = max(errors.values())
        for mode in modes:
            run = waiting_for(self.problem.x.device, partial(candidate.run, mode))
            self.tasks[group, name, mode] = Task(run, surroundings)
        return candidate

    def admit_peers(self, names: Iterable[str]) -> dict[str, Peer]:
        """Those of PEERS that can run here and compute right."""
        admitted = {}
        for name in names:
            reason = reason_to_skip(name, self.problem)
            if reason is not None:
                self.skipped[name] = reason
                continue
            make = partial(PEERS[name], self.problem)
            peer = self.admit("peers", name, PEERS[name].modes, make)
            if peer is not None:
                admitted[name] = peer
        return admitted

    def ratio(self, group: str, a: str, b: str, mode: str) -> float:
        """How many times as long as candidate `b` candidate `a` takes."""
        return ratio(self.tasks[group, a, mode], self.tasks[group, b, mode])

    def times(self, group: str) -> dict[str, dict[str, dict[str, float]]]:
        """Candidate -> mode -> percentiles in ms."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (part, name, mode), task in self.tasks.items():
            if part == group:
                found.setdefault(name, {})[mode] = task.summary()
        return found
