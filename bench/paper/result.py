"""What is kept of a run after training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.paper.run import Run
from bench.paper.training import Outcome


@dataclass(frozen=True)
class Result:
    """measures: what `measures.measure` says of the trained network, numbers and lists by name."""

    run: Run
    outcome: Outcome
    measures: dict[str, Any] = field(default_factory=dict)
