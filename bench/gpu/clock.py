"""Times calls on the GPU: eager ones and CUDA graphs."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLES = 50
LONG = 0.2  # ms of a sample of graphs, beside which the launch of a graph is short
MOST_CALLS = 50  # in a graph


def milliseconds(
    run: Callable[[], object], calls: int = 1, samples: int = 0, limit: float = 1.0
) -> dict[str, float]:
    """Percentiles of the time of one of the `calls` that `run` makes on the current stream."""
    run()
    run()
    torch.cuda.synchronize()
    samples = samples or SAMPLES
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < samples and (time.perf_counter() - started < limit or len(found) < 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / calls)
    return {f"p{q}": float(np.percentile(found, q)) for q in (20, 50, 80)}


def replayed(run: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """`calls` calls as one CUDA graph, without gaps between launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def graph_milliseconds(
    run: Callable[[], object], samples: int = 0, limit: float = 1.0
) -> dict[str, float]:
    """Percentiles of the time of a call in a graph of as many as make a sample LONG.

    The launch of a graph on an idle GPU takes several microseconds, which a sample includes.
    """
    calls, graph = 1, replayed(run)
    while calls < MOST_CALLS:
        sample = calls * milliseconds(graph, calls, samples=3)["p50"]
        if sample >= LONG:
            break
        calls = min(MOST_CALLS, calls * math.ceil(LONG / sample))
        graph = replayed(run, calls)
    return milliseconds(graph, calls, samples, limit)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """TF32 products or bf16 autocast. No casts are kept: weights change with every step."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16, name == "bf16", cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def peak_bytes(run: Callable[[], object]) -> int:
    """What a call allocates at most beside what is there already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def one_line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}".splitlines()[0][:200]


def save(path: Path, results: dict[str, Any]) -> None:
    """The results so far: the process may be killed before its end."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results) + "\n")
    temporary.replace(path)
