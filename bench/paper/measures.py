"""What is measured of a trained network."""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.paper.splits import Split


def measure(model: nn.Sequential, data: Split) -> dict[str, Any]:
    return {}
