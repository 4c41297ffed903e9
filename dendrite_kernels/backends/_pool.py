"""torch's own thread pool, found at run time so that nothing links against torch.

Every CPU kernel of this package runs on the threads torch already has: `torch_parallel_for`, a C
function that libtorch_cpu exports since torch 2.10. A second pool (another libgomp, a Numba
threading layer) would fight torch's for the cores, change its settings or die in forked children.

Which threads do the work: the caller's and torch's intra-op workers, as many as
`torch.get_num_threads()` says. The OpenMP runtime keeps one team of workers per calling thread,
so calls from several Python threads at once are safe; a call from inside a parallel region runs
serially, as torch's own operators do.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

# A forked child has none of its parent's worker threads, and GNU OpenMP waits for them forever.
# torch's operators have the same fault; ours run serially in the child instead.
_forked = ctypes.c_bool(False)


def _mark_forked() -> None:
    _forked.value = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def forked() -> bool:
    """True in a child made by fork(): kernels must not enter the pool there."""
    return _forked.value


def forked_address() -> int:
    """Where native code finds what `forked` says, a bool."""
    return ctypes.addressof(_forked)


def _library_files() -> list[str]:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    beside = Path(torch.__file__).parent / "lib" / name
    # A distribution may keep torch's libraries elsewhere; torch's own module then leads to them,
    # since a symbol look-up searches what a library depends on.
    return [str(beside), str(torch._C.__file__)]


def _function(name: str) -> ctypes._NamedFuncPointer:
    errors = []
    for file in _library_files():
        try:
            return ctypes.CDLL(file)[name]
        except (OSError, AttributeError) as error:
            errors.append(str(error))
    raise RuntimeError(
        f"Expected torch >= 2.10, whose libtorch_cpu exports {name}, got torch "
        f"{torch.__version__} ({'; '.join(errors)})"
    )


def address(name: str) -> int:
    """Address of one of the C functions by which torch shows its pool:

    int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                               void (*function)(int64_t begin, int64_t end, void* context),
                               void* context)
    int32_t torch_get_num_threads(uint32_t* threads)

    Raises RuntimeError where torch does not have it.
    """
    found = ctypes.cast(_function(name), ctypes.c_void_p).value
    assert found is not None
    return found


@functools.cache
def _parallel_for() -> ctypes._NamedFuncPointer:
    function = _function("torch_parallel_for")
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    function.restype = ctypes.c_int32
    return function


_native = functools.lru_cache(_ENTRY)  # of an address


def run(entry: int, tasks: int, context: int) -> None:
    """Call the native function at `entry` on [0, tasks), split over torch's threads.

    `entry(begin, end, context)` must do its tasks in any order and never wait for another one:
    with fewer threads than tasks, or in a forked child, one thread does them all in turn.
    The global interpreter lock is released meanwhile.
    """
    if tasks == 1 or forked():
        _native(entry)(0, tasks, context)
    elif _parallel_for()(0, tasks, 1, entry, context) != 0:
        raise RuntimeError("torch_parallel_for reported an error")
