"""Runs the cases of ../check.py with the kernels that nvcc made; the last line is a report in JSON.

    python -m tests.cuda_emulator.ptx.check MODULE [--cases quick|all] [--orders 1 7] [--part 0/2]

The module checks each access of every thread: see runtime.cpp. Here it is told which tensors a
launch may touch: those that the package passes, and no others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dendrite_kernels.backends import cuda
from tests.cuda_emulator import check
from tests.cuda_emulator.ptx.calls import Library


class Watched:
    """The extension module, which announces the tensors of each call before it."""

    def __init__(self, module: Any, library: Library) -> None:
        self._module = module
        self._library = library
        self.set_order = module.set_order
        self.Plan, self.Adam = module.Plan, module.Adam
        self.Packed = _remembering(module.Packed)

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._module, name)

        def call(*arguments: Any) -> None:
            kept = [t for argument in arguments for t in getattr(argument, "tensors", [])]
            tensors = [*_tensors(arguments), *kept]
            self._library.announce((t.data_ptr(), t.nbytes) for t in tensors)
            function(*arguments)

        return call


def _remembering(base: Any) -> Any:
    """A class of the module that keeps the tensors that it was made of."""

    class Remembering(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tensors = _tensors(arguments)

    return Remembering


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--cases", choices=["quick", "all"], default="quick")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 7])
    parser.add_argument("--part", default="0/1", help="first/n: every n-th case")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    check.poison(True)
    torch.set_num_threads(1)
    library = Library(options.module)
    module = Watched(check.load(options.module), library)
    backend: Any = cuda
    backend._load = lambda: (module, None)
    first, step = (int(number) for number in options.part.split("/"))
    cases = check.selected(options.cases, options.orders)[first::step]
    wrong = [f"{case}: {fault}" for case, o in cases for fault in check.check(case, o, module)]
    print(json.dumps({"cases": len(cases), "wrong": wrong, **library.report()}))


if __name__ == "__main__":
    main()
