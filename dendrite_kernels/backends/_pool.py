"""The thread pool of torch, looked up at run time so that nothing links against torch.

All CPU kernels of this package run on the threads of torch, through `torch_parallel_for`, a C
function in libtorch_cpu since torch 2.10. A second pool (another libgomp, a threading layer of
Numba) would compete with torch for the cores, change its settings or crash in forked children.

The work is done by the calling thread and torch's intra-op workers, `torch.get_num_threads()`
threads in all. The OpenMP runtime has one team of workers for each calling thread, so several
Python threads may call at the same time. A call from inside a parallel region runs serially, as
operators of torch do.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

# A forked child has none of the worker threads, and GNU OpenMP would wait for them forever, as it
# does in operators of torch. So kernels run serially in the child.
_forked = ctypes.c_bool(False)


def _mark_forked() -> None:
    _forked.value = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def forked() -> bool:
    """True in a child made by fork(): kernels must not enter the pool there."""
    return _forked.value


def forked_address() -> int:
    """Address of the bool behind `forked`, for native code."""
    return ctypes.addressof(_forked)


def _library_files() -> list[str]:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    beside = Path(torch.__file__).parent / "lib" / name
    # Some distributions put torch's libraries elsewhere. Then torch._C leads to them: a symbol is
    # also looked up in the libraries that a library depends on.
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
    """Address of one of the C functions of torch's pool:

    int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                               void (*function)(int64_t begin, int64_t end, void* context),
                               void* context)
    int32_t torch_get_num_threads(uint32_t* threads)

    Raises RuntimeError if torch does not have it.
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


_native = functools.lru_cache(_ENTRY)  # address -> callable


def run(entry: int, tasks: int, context: int) -> None:
    """Call the native function at `entry` on [0, tasks), divided over the threads of torch.

    `entry(begin, end, context)` must accept tasks in any order, and no task may wait for another
    one: a thread may do several tasks one after another, in a forked child all of them. The GIL is
    released during the call.
    """
    if tasks == 1 or forked():
        _native(entry)(0, tasks, context)
    elif _parallel_for()(0, tasks, 1, entry, context) != 0:
        raise RuntimeError("torch_parallel_for reported an error")
