"""What a Numba kernel is specialised for, as a compile-time token, and how operations read it.

A `Spec` that a kernel closes over or is passed has no value at run time, only a type. Operations
find in that type the element type, the samples per tile and the register width, so one kernel
source serves every combination and a token costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
from numba.core import types
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, register_model, typeof_impl

ISA_BITS = {"base": 128, "neon": 128, "avx2": 256, "avx512": 512}  # of a vector register
_NEEDS = {"avx512": ("avx512f", "avx512dq", "avx512bw", "avx512vl"), "avx2": ("avx2", "fma")}


@functools.cache
def isa() -> str:
    """Which vector width kernels are compiled for: base, avx2, avx512 or neon.

    The host's best, or DENDRITE_KERNELS_ISA. That variable only chooses the width: within it LLVM
    still uses every instruction of the host (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES limit those).

    Raises RuntimeError if the host does not have what the variable asks for.
    """
    listed = numba.config.CPU_FEATURES
    if listed is None:
        features = dict(llvmlite.binding.get_host_cpu_features())
    else:
        features = {item[1:]: item[0] == "+" for item in listed.split(",") if item}
    usable = [name for name, parts in _NEEDS.items() if all(map(features.get, parts))] + ["base"]
    if platform.machine().lower() in ("aarch64", "arm64"):
        usable.insert(0, "neon")  # every such machine has it
    chosen = os.environ.get("DENDRITE_KERNELS_ISA") or usable[0]
    if chosen not in usable:
        raise RuntimeError(f"Expected DENDRITE_KERNELS_ISA among {usable}, got {chosen!r}")
    return chosen


@dataclass(frozen=True)
class Spec:
    """What one compiled kernel is made for."""

    element: str  # "float32" or "float64"
    column: str  # type of column indices, "uint16" or "int32"
    lanes: int  # samples in a tile: 8 to 64
    register: int  # lanes of one vector register
    linear: bool  # plain sparse rows: no nonlinearity, no somas
    build: str  # fingerprint of the sources, so that no cache outlives them


class Token(types.Type):  # type: ignore[misc]
    """Numba's type of one particular `Spec`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        super().__init__(name=repr(spec))


@register_model(Token)
class _TokenModel(models.OpaqueModel):  # type: ignore[misc]
    pass


@typeof_impl.register(Spec)
def _token_of(value: Spec, context: Any) -> Token:
    return Token(value)


@lower_constant(Token)
def _no_value(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


def operation(typed: Callable[..., Any]) -> Any:
    """A function that kernels can call, from `typed(types of the arguments) -> (signature, emit)`.

    `emit(b, values of the arguments)` writes LLVM instructions with the builder b and returns the
    result, a tuple of results, or None.
    """

    @functools.wraps(typed)
    def define(context: Any, *kinds: Any) -> Any:
        signature, emit = typed(*kinds)

        def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
            result = emit(b, *values)
            if isinstance(result, tuple):
                return context.make_tuple(b, signature.return_type, result)
            return context.get_dummy_value() if result is None else result

        return signature, generate

    # Numba takes the names of the arguments from here, and the first to be its typing context.
    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = inspect.signature(typed).parameters.values()
    define.__signature__ = inspect.Signature([own, *names])  # type: ignore[attr-defined]
    return intrinsic(prefer_literal=True)(define)
