# SPDX-License-Identifier: Apache-2.0
"""The kernel that waits for words, as g++ compiles its text, and the waits of the host."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from support.cuda_on_cpu import compiled, why_not
from support.waits import LIMIT, until

from portakv.runtime.streams import CONNECTIONS, LAST, TEXT, HostWords, Word, few_queues

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
_CLOCK = 'asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));'
_SLEEP = 'asm volatile("nanosleep.u32 200;");'
_HEAD = """
#include <time.h>
static void __threadfence_system() { __sync_synchronize(); }
[[maybe_unused]] static long long nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1000000000ll * t.tv_sec + t.tv_nsec;
}
// The timer of another multiprocessor may be behind.
[[maybe_unused]] static long long falling() {
  static long long at = 1000000;
  return at -= at > 0;
}
"""
_ENTRY = """
extern "C" void wait_for(unsigned* words, long long limit) {
  portakv_wait({words, words + 1, words + 2, words + 3, limit});
}
"""


class Kernel:
    """The kernel's wait for the words needed, copied, raised and expired, by a function of the
    head as its clock."""

    def __init__(
        self,
        needed: int,
        copied: int,
        raised: int,
        expired: int = 0,
        clock: str = "nanoseconds",
        text: str = TEXT,
    ) -> None:
        self.words = np.array([needed, copied, raised, expired], Word)
        text = _HEAD + text.replace(_CLOCK, f"ns = {clock}();").replace(_SLEEP, "")
        assert "asm" not in text
        run: Callable[..., None] = compiled(text, _ENTRY).wait_for
        run.argtypes = [ctypes.c_void_p, ctypes.c_int64]  # type: ignore[attr-defined]
        self._run = run

    def wait(self, limit: float = LIMIT) -> None:
        self._run(self.words.ctypes.data, round(1e9 * limit))

    @property
    def expired(self) -> int:
        return int(self.words[3])


@needs_compiler
def test_it_waits_where_the_host_does() -> None:
    """With a limit of 0, only a wait that would block marks the step."""
    chance = random.Random(5)
    near = [0, 1, 2, 3, LAST - 1, LAST]
    blocked = 0
    for _ in range(2000):
        needed, copied, raised, expired = (chance.choice(near) for _ in range(4))
        host = HostWords(1, 0.0)
        host.need(needed)
        host.write(0, 1, copied, None)
        host.raised[0] = raised
        host.expired = expired
        kernel = Kernel(needed, copied, raised, expired)
        kernel.wait(0)
        if host.lacks(0):
            blocked += 1
            assert kernel.expired == needed
        else:
            assert kernel.expired == expired
    assert 200 < blocked < 1800


@needs_compiler
def test_it_ends_when_both_words_are_there() -> None:
    kernel = Kernel(7, 6, 6)
    waiting = threading.Thread(target=kernel.wait)
    waiting.start()
    for place in (1, 2):
        waiting.join(0.01)
        assert waiting.is_alive()
        kernel.words[place] = 7
    assert until(lambda: not waiting.is_alive())
    assert kernel.expired == 0


@needs_compiler
def test_after_a_limit_the_other_waits_of_the_step_end_at_once() -> None:
    kernel = Kernel(7, 6, 6)
    kernel.wait(1e-4)
    assert kernel.expired == 7
    kernel.wait()
    kernel.words[0] = 8
    waiting = threading.Thread(target=kernel.wait)
    waiting.start()
    waiting.join(0.01)
    assert waiting.is_alive()
    kernel.words[1:3] = 8
    assert until(lambda: not waiting.is_alive())


@needs_compiler
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "negative control"])
def test_a_clock_that_falls_ends_no_wait(signed: bool) -> None:
    """A thread block may go on, after a time slice, where the timer is behind."""
    unsigned = "static_cast<unsigned long long>(now() - begin) > 30000000000ull"
    text = TEXT if signed else TEXT.replace("now() - begin > w.limit", unsigned)
    assert signed is (text == TEXT)
    kernel = Kernel(7, 6, 6, clock="falling", text=text)
    waiting = threading.Thread(target=kernel.wait)
    waiting.start()
    waiting.join(0.01)
    assert waiting.is_alive() is signed
    kernel.words[1:3] = 7
    assert until(lambda: not waiting.is_alive())
    assert kernel.expired == (0 if signed else 7)


@pytest.mark.parametrize(
    ("many", "is_refused"), [("1", True), ("2", True), ("8", False), (None, False)]
)
def test_streams_that_share_few_queues_are_refused(many: str | None, is_refused: bool) -> None:
    """The copies would wait for the wait."""
    why = few_queues({} if many is None else {CONNECTIONS: many})
    assert (why is not None) is is_refused
