"""The threads of compiled code: each piece of a job is done once, whoever comes late (kernels/cpu/pool.c)."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from backend.kernels.cpu.products import tiles_library

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@pytest.mark.parametrize(
    ("threads", "count", "chunk"),
    [(1, 7, 2), (2, 1, 1), (2, 9, 4), (2, 36, 4), (3, 100, 7), (8, 5, 1), (8, 64, 6), (2, 0, 1), (12, 700, 2)],
)
def test_every_piece_is_done_once(threads: int, count: int, chunk: int) -> None:
    library = tiles_library()
    if library is None:
        pytest.skip("not run: there is no C compiler here")
    done: list[tuple[int, int]] = []

    @WORK
    def work(_: int | None, first: int, last: int) -> None:
        done.append((first, last))

    for _ in range(5):
        done.clear()
        library.suri_parallel(
            ctypes.c_int(threads), ctypes.c_int64(count), ctypes.c_int64(chunk), work, ctypes.c_void_p(0)
        )
        assert sorted(place for first, last in done for place in range(first, last)) == list(range(count))
        assert threads == 1 or all(0 < last - first <= chunk for first, last in done)


def test_what_a_late_thread_has_left_is_done_by_others() -> None:
    library = tiles_library()
    if library is None:
        pytest.skip("not run: there is no C compiler here")
    main, by_main, go_on = threading.get_ident(), [], threading.Event()

    @WORK
    def work(_: int | None, first: int, last: int) -> None:
        if threading.get_ident() == main:
            by_main.append(first)
            if len(by_main) == 19:  # all but the one piece in which the helper waits
                go_on.set()
            elif len(by_main) == 1:
                time.sleep(0.05)  # let the helper begin
        else:
            go_on.wait(10)

    library.suri_parallel(ctypes.c_int(2), ctypes.c_int64(20), ctypes.c_int64(1), work, ctypes.c_void_p(0))
    assert len(by_main) >= 19  # 20 where the helper came too late for any
