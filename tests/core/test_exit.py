# SPDX-License-Identifier: Apache-2.0
"""The process ends while a daemon thread waits for a driver in the core.

Before Python 3.14 the interpreter ends such a thread when it asks for the interpreter again, by
unwinding its stack: no frame of the core may catch that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ctypes import addressof
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_build import loaded
from support.cuda_on_cpu import why_not
from support.whole_copies import needs_whole_copies

libc = ctypes.CDLL(None)
#: What lets the driver's call end: a semaphore, the address of one, and what waits for it.
semaphore = (ctypes.c_char * 64)()
libc.sem_init(semaphore, 0, 0)
WAIT = ctypes.cast(libc.sem_wait, ctypes.c_void_p).value or 0

#: The shape that the core's functions had: a frame that catches all exceptions takes the
#: interpreter back.
CATCHES = """
extern "C" int semaphore_wait(void *semaphore, int (*wait)(void *), void *(*leave)(void),
                              void (*enter)(void *)) {
  try {
    void *const thread = leave();
    const int result = wait(semaphore);
    enter(thread);
    return result;
  } catch (...) {
    return -1;
  }
}
"""

Call = Callable[[], object]


def query() -> Call:
    """Ask about an event."""
    from portakv.core.call import CopyEnd, calls

    word = ctypes.c_int64()
    end = CopyEnd(0, addressof(semaphore), 0, WAIT, addressof(word))
    asked = calls().query_end
    kept = word, end
    return lambda: asked(addressof(kept[1]))


def pieces() -> Call:
    """Copy by calls of a link's driver, the last of which records an event."""
    from interconnect.test_submission import Whole

    layout = "block layer kv token head dim"
    rig = Whole(pytest.MonkeyPatch(), (layout, layout), True)
    rig.event = addressof(semaphore), WAIT
    whole = rig.by_pieces()
    return lambda: rig.make(whole)


def kernels(copy: str) -> Call:
    """Copy by kernels, after which an event is recorded."""
    from support.ending_driver import EndingDriver, EndingOnCpu

    from portakv import AdaptiveConnector, KVView, copy_blocks
    from portakv.registry.registry import REGISTRY
    from portakv.runtime.cuda import EventFunctions

    class Waiting(EndingDriver):
        @property
        def events(self) -> EventFunctions:
            return super().events._replace(create=self.create, record_address=WAIT)

        def create(self, event: Any, _: int) -> int:
            ctypes.cast(event, ctypes.POINTER(ctypes.c_void_p))[0] = addressof(semaphore)
            return 0

    EndingOnCpu.driver = Waiting
    name = EndingOnCpu.name
    REGISTRY.register(name, EndingOnCpu)
    caches = [torch.zeros(2, 4, 4, 2, 8)]
    if copy == "chunk":
        connector = AdaptiveConnector("cpu", backend=name)
        connector.register_kv_caches(caches)
        chunk = torch.zeros(2, 1, 4, 16)
        return lambda: connector.from_gpu(chunk, slot_mapping=[3, 1, 2, 0])
    src = KVView(torch.zeros(4, 4, 16), "block token dim")
    dst = KVView(torch.zeros(4, 4, 16), "block token dim")
    return lambda: copy_blocks(src, dst, [3, 1], [0, 2], backend=name)


def by_ctypes() -> Call:
    """Wait as ctypes does, for comparison."""
    return lambda: libc.sem_wait(semaphore)


def caught(library: str) -> Call:
    """Wait in a frame that catches all exceptions."""
    function = ctypes.PyDLL(library).semaphore_wait
    python = ctypes.pythonapi
    steps = python.PyEval_SaveThread, python.PyEval_RestoreThread
    return lambda: function(semaphore, libc.sem_wait, *steps)


class Last:
    """An object whose end is a part of the interpreter's."""

    def __init__(self, thread: int) -> None:
        self._task = f"/proc/self/task/{thread}"
        self._needs: Any = partial(libc.sem_post, semaphore), os.path.exists, time.sleep, os.write

    def __del__(self) -> None:
        post, exists, sleep, write = self._needs
        post()
        # Since 3.14 the thread stays, and hangs.
        for _ in range(1000 if sys.version_info < (3, 14) else 10):
            if not exists(self._task):
                break
            sleep(0.01)
        write(1, b"ended")


def child(call: Call) -> Last:
    """Let a daemon thread wait; return what the caller keeps until the interpreter ends."""
    libc.sem_post(semaphore)
    posted = semaphore.raw
    while semaphore.raw == posted:
        call()  # the first copy may load what the next one waits with
    idle = semaphore.raw
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while semaphore.raw == idle:  # it counts who waits
        time.sleep(0.01)
    assert thread.native_id is not None
    return Last(thread.native_id)


def exit_within(call: str) -> subprocess.CompletedProcess[str]:
    """End a process whose daemon thread waits in a call of this module."""
    script = f"from core import test_exit as t; last = t.child(t.{call})"
    command = [sys.executable, "-c", script]
    tests = Path(__file__).parents[1]  # the first place that the script imports from
    return subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)


CALLS = ["by_ctypes()", "query()", "kernels('chunk')", "kernels('views')", "pieces()"]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@needs_whole_copies
@pytest.mark.parametrize("call", CALLS)
def test_the_process_ends(call: str) -> None:
    done = exit_within(call)
    assert (done.returncode, done.stdout) == (0, "ended"), done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the thread is not unwound")
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_frame_that_catches_ends_in_an_abort(tmp_path: Path) -> None:
    source = tmp_path / "catches.cpp"
    source.write_text(CATCHES)
    library = str(tmp_path / "catches.so")
    compiler = loaded().compiler()
    shared = "-shared", "-fPIC", "-static-libstdc++", "-static-libgcc"
    subprocess.run([*compiler, *shared, str(source), "-o", library], check=True)
    assert exit_within(f"caught({library!r})").returncode == -signal.SIGABRT
