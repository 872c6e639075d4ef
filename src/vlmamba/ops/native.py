"""Native code on the CPU: which host this is, LLVM's compiler, and the threads that run the kernels.

llvmlite brings LLVM; nothing is compiled before a kernel is first called. The kernels are called through ctypes, which
releases the GIL, so plain Python threads run them side by side. There is no second OpenMP runtime next to torch's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")


@dataclass(frozen=True)
class Host:
    """What the code generator needs to know of the CPU."""

    name: str
    lanes: int  # of float32 in a vector register
    avx512: bool


@functools.cache
def refusal() -> str | None:
    """Why native code cannot be generated here; None if it can."""
    if platform.machine().lower() not in _MACHINES:
        return f"no native code for a {platform.machine()} processor"
    try:
        import llvmlite.binding  # noqa: F401
    except ImportError:
        return "llvmlite is not installed (pip install llvmlite)"
    except OSError as error:
        return f"llvmlite does not load its LLVM: {error}"
    return None


def describe() -> str:
    """One line on the code that is generated."""
    import llvmlite

    found = host()
    return f"native code by llvmlite {llvmlite.__version__}, {found.lanes} lanes of float32 ({found.name})"


@functools.cache
def host() -> Host:
    """The CPU of this machine."""
    import llvmlite.binding as llvm

    if platform.machine().lower() in ("aarch64", "arm64"):
        return Host("NEON", 4, False)
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512dq") and features.get("avx512vl"):
        return Host("AVX-512", 16, True)
    if features.get("avx2") and features.get("fma"):
        return Host("AVX2", 8, False)
    return Host("SSE", 4, False)


class Kernel:
    """A compiled function `void (table of int64 arguments, first block, last block)`."""

    def __init__(self, name: str, text: str) -> None:
        self._engine = _compile(text)  # owns the code
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
            self._engine.get_function_address(name)
        )

    def __call__(self, table: Sequence[int], first: int, last: int) -> None:
        self._call((ctypes.c_int64 * len(table))(*table), first, last)


def _compile(text: str) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    # The text is already what LLVM's passes would make of it (they took longer than all the rest and gained nothing).
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2, jit=True
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


Task = Callable[[], None]

SMALL = 2_000_000  # state updates, half a millisecond: below, waking other threads costs more than it brings


def threads_for(work: int) -> int:
    """How many threads to use for so many state updates."""
    return 1 if work < SMALL else torch.get_num_threads()


def run(tasks: Sequence[Task], threads: int) -> None:
    """Run tasks side by side on so many threads, or one after the other on the calling thread."""
    if threads == 1 or len(tasks) == 1:
        for task in tasks:
            task()
        return
    for future in [_pool(threads, os.getpid()).submit(task) for task in tasks]:
        future.result()


@functools.lru_cache(maxsize=1)  # by process too: threads do not survive a fork
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vlmamba-ops")
