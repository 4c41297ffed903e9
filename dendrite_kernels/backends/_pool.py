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
_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def forked() -> bool:
    """True in a child made by fork(): kernels must not enter the pool there."""
    return _forked


def _library_files() -> list[str]:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    beside = Path(torch.__file__).parent / "lib" / name
    # A distribution may keep torch's libraries elsewhere; torch's own module then leads to them,
    # since a symbol look-up searches what a library depends on.
    return [str(beside), str(torch._C.__file__)]


@functools.cache
def _parallel_for() -> ctypes._NamedFuncPointer:
    errors = []
    for file in _library_files():
        try:
            function = ctypes.CDLL(file).torch_parallel_for
        except (OSError, AttributeError) as error:
            errors.append(str(error))
            continue
        function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
        function.restype = ctypes.c_int32
        return function
    raise RuntimeError(
        f"Expected torch >= 2.10, whose libtorch_cpu exports torch_parallel_for, got torch "
        f"{torch.__version__} ({'; '.join(errors)})"
    )


def torch_parallel_for_address() -> int:
    """Address of `int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
    void (*function)(int64_t begin, int64_t end, void* context), void* context)`.

    Raises RuntimeError where torch does not have it.
    """
    address = ctypes.cast(_parallel_for(), ctypes.c_void_p).value
    assert address is not None
    return address


_function = functools.lru_cache(_ENTRY)  # of an address


def run(entry: int, tasks: int, context: int) -> None:
    """Call the native function at `entry` on [0, tasks), split over torch's threads.

    `entry(begin, end, context)` must do its tasks in any order and never wait for another one:
    with fewer threads than tasks, or in a forked child, one thread does them all in turn.
    The global interpreter lock is released meanwhile.
    """
    if tasks == 1 or _forked:
        _function(entry)(0, tasks, context)
    elif _parallel_for()(0, tasks, 1, entry, context) != 0:
        raise RuntimeError("torch_parallel_for reported an error")
