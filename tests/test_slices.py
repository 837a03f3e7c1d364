"""Threads that compute ask the system for long turns, and no others (kernels/cpu/slice.c)."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from backend.kernels.cpu.products import tiles_library
from backend.kernels.cpu.slices import long_slices
from backend.presets import Preset
from backend.runtime import Prepared, Runtime
from tests.test_pool import WORK

LONG = 20_000_000  # nanoseconds
GETATTR = {"x86_64": 315, "aarch64": 275}  # the number of sched_getattr

Result = TypeVar("Result")


class Attributes(ctypes.Structure):
    """What Linux says of a thread's turns (sched_setattr(2)); times in nanoseconds."""

    _fields_ = [
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    ]  # fmt: skip


def mine() -> Attributes:
    """Of the thread that asks; all zero where nobody can tell."""
    number = GETATTR.get(platform.machine()) if sys.platform == "linux" else None
    found = Attributes()
    if number is not None:
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    return found


def in_thread(function: Callable[[], Result]) -> Result:
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def needs() -> None:
    if tiles_library() is None:
        pytest.skip("not run: there is no C compiler here")
    if not mine().runtime:
        pytest.skip("not run: Linux gives turns of a length of choice from 6.12 on")


def test_a_thread_that_asks_has_long_turns_and_is_the_same_otherwise() -> None:
    def ask() -> tuple[Attributes, Attributes, Attributes]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)  # on Linux: of this thread
        before = mine()
        long_slices()
        return before, mine(), in_thread(mine)

    before, after, started_later = in_thread(ask)
    assert before.runtime < LONG
    assert after.runtime == started_later.runtime == LONG
    for name, *_ in Attributes._fields_:
        assert name == "runtime" or getattr(after, name) == getattr(before, name), name
    assert after.nice == 5
    assert mine().runtime < LONG  # who started it has not


def test_the_helpers_of_the_pool_have_long_turns_and_their_caller_has_its_own() -> None:
    library = tiles_library()
    assert library is not None
    found: dict[int, int] = {}
    both = threading.Barrier(2)

    @WORK
    def work(_: int | None, first: int, last: int) -> None:
        found[threading.get_ident()] = mine().runtime
        both.wait(10)

    before = mine().runtime
    library.suri_parallel(ctypes.c_int(2), ctypes.c_int64(2), ctypes.c_int64(1), work, ctypes.c_void_p(0))
    assert found.pop(threading.get_ident()) == before < LONG
    assert list(found.values()) == [LONG]


def test_an_engine_on_the_cpu_has_long_turns(tiny_path: Callable[..., Path]) -> None:
    path = tiny_path(weights="Q4_1")
    runtime = Runtime(Prepared(Preset("slices", str(path), device="cpu"), path), max_waiting=8)
    assert runtime.worker.ask(lambda: mine().runtime) == LONG
    assert mine().runtime < LONG
    runtime.close(drain=False)
