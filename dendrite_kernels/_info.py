"""What runs here: versions, devices, threads, and what each backend can do."""

from __future__ import annotations

import torch

import dendrite_kernels as dk

from .benchmark.environment import describe


def print_machine() -> None:
    found = describe()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"processor: {found['cpu']}, {found['system']}")
    print(f"threads: {found['threads']}")
    print(f"CUDA devices: {', '.join(devices) or 'none'}")
    versions = {"python": found["python"], **found["versions"]}
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def print_backends() -> None:
    for name, entry in dk.backend_info().items():
        details = {k: v for k, v in entry.items() if k not in ("available", "reason")}
        print(f"{name}: {'available' if entry['available'] else 'not available'}")
        print(f"    {entry['reason'] or ', '.join(f'{k} {v}' for k, v in details.items())}")
