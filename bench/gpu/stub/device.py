"""torch.cuda without a GPU: the little of it that the stages and tests/gpu use."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench.gpu.processes import NO_DEVICE
from dendrite_kernels import backends
from tests.cuda_emulator import build, check

WAITS = (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.__bool__)


class OnCpu(TorchFunctionMode):
    """Every device "cuda" means the CPU; bytes of results are counted."""

    capturing = False
    allocated = peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            wait()
        if func is torch.Tensor.cuda:
            return args[0]
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        result = func(*(_on_cpu(value) for value in args), **named)
        if type(result) is torch.Tensor and all(result is not value for value in args):
            count(result)
        return result


def _on_cpu(value: Any) -> Any:
    is_device = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_device else value


def count(result: torch.Tensor) -> None:
    """Counts a tensor that is no view, as long as it is there."""
    if result.layout == torch.strided and result._base is None:
        OnCpu.allocated += result.nbytes
        OnCpu.peak = max(OnCpu.peak, OnCpu.allocated)
        weakref.finalize(result, forget, result.nbytes)


def forget(size: int) -> None:
    OnCpu.allocated -= size


def wait(*_: object) -> None:
    """What synchronises fails while a graph is captured, as on a GPU."""
    if OnCpu.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds)

    synchronize = wait


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: Stream) -> None:
        """There is one stream."""

    synchronize = wait


class Graph:
    """Kernels run while they are captured; a replay leaves their results as they are."""

    def replay(self) -> None:
        time.sleep(1e-4)


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    OnCpu.capturing = True
    try:
        yield
    finally:
        OnCpu.capturing = False


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *arguments, **options)


def forget_peak() -> None:
    OnCpu.peak = OnCpu.allocated


def limited(make_plan: Any) -> Any:
    """Kernels that gather from L2 need too many registers for blocks of 1024 threads."""

    def make(vec: int, groups: int, shared: bool, blocks: int, threads: int, *rest: int) -> Any:
        if threads > 512 and not shared:
            raise RuntimeError("too many resources requested for launch")
        return make_plan(vec, groups, shared, blocks, threads, *rest)

    return make


PROPERTIES = SimpleNamespace(
    name=NO_DEVICE, total_memory=1 << 30, multi_processor_count=3, clock_rate=1_000_000
)
FAKES: dict[str, Any] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: NO_DEVICE,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: PROPERTIES,
    "mem_get_info": lambda *_: (0, 1 << 30),
    "synchronize": wait,
    "empty_cache": lambda: None,
    "set_sync_debug_mode": lambda *_: None,
    "_sleep": lambda *_: None,
    "memory_allocated": lambda *_: OnCpu.allocated,
    "max_memory_allocated": lambda *_: OnCpu.peak,
    "reset_peak_memory_stats": lambda *_: forget_peak(),
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "graph": capture,
    "stream": contextlib.nullcontext,
    "current_stream": lambda *_: Stream(),
    "profiler": SimpleNamespace(start=lambda: None, stop=lambda: None),
}


def install() -> None:
    for name, fake in FAKES.items():
        setattr(torch.cuda, name, fake)
    set_default = torch.set_default_device
    replaced: dict[str, Any] = {
        "compile": lambda model, **_: model,  # its compiler would look for the device
        "autocast": Autocast,
        "set_default_device": lambda device: set_default(_on_cpu(device)),
    }
    for name, fake in replaced.items():
        setattr(torch, name, fake)
    extension = check.load(str(build.build(sanitize=False)))
    extension.archs = NO_DEVICE
    extension.Plan = limited(extension.Plan)
    extension.runtime_version = extension.driver_version = lambda: 0
    backends._BY_DEVICE["cpu"] = ("cuda",)
    backends._SERVES["cuda"] = "cpu"
    OnCpu().__enter__()
