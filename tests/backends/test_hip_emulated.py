# SPDX-License-Identifier: Apache-2.0
"""`hip` over the fake driver on a CPU: every byte of the table of copies, and bad ids. EMULATED.

The suite's own matrix runs by ``portakv conform
portakv_conformance.vendor.hip_emulated:HipEmulated``, which takes minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from support.command_line import registered
from support.cuda_cases import COPIES, Copy, by, chunk, pool
from support.hip_cases import emulated, needs_compiler

from portakv import copy_rows
from portakv.backends import rows_kernel
from portakv_conformance.vendor.hip_emulated import HipEmulated

pytestmark = needs_compiler


@pytest.fixture(scope="module", autouse=True)
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Registered, with a cache on disk of its own."""
    with pytest.MonkeyPatch.context() as patched, registered(**{HipEmulated.name: HipEmulated}):
        patched.delenv("PORTAKV_BACKEND", raising=False)
        patched.setenv("PORTAKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", COPIES)
def test_every_byte_lands(name: str) -> None:
    copied = COPIES[name]()
    src, dst = copied.src, copied.dst
    copied.check(
        lambda: copy_rows(
            src.view(), dst.view(), src.index(), dst.index(), count=copied.count,
            backend=HipEmulated.name,
        ).synchronize()
    )  # fmt: skip


def judged(copied: Copy, told: bool = True) -> int:
    """Launch behind the library's checks and judge every byte; returns the status word."""
    src, dst = copied.src, copied.dst
    status = torch.zeros(1, dtype=torch.int64)
    launch = emulated().prepare(copied.plan())
    copied.check(
        lambda: launch(
            src.view(), dst.view(), src.index(), dst.index(), copied.count, None,
            status if told else None,
        )
    )  # fmt: skip
    return int(status)


@pytest.mark.parametrize("bad", [12, 2**31, 2**32 + 1, 2**63 - 1])
def test_a_bad_id_moves_nothing_and_is_told(bad: int) -> None:
    slots = [3, 1, -1, 7, bad, 11, 5, -(2**31)]
    gathers, scatters = Copy(by(pool(), slots), chunk(8), 8), Copy(chunk(8), by(pool(), slots), 8)
    assert [judged(gathers), judged(scatters)] == [5, 5]
    assert [judged(gathers, told=False), judged(scatters, told=False)] == [0, 0]


def test_a_copy_of_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are named by their place in the whole."""
    monkeypatch.setattr(rows_kernel, "_MAX_VECTORS", 8)
    slots = [*range(11, -1, -1), *range(11)]
    slots[17] = 12
    assert judged(Copy(by(pool(), slots), chunk(23), 23)) == 18


def test_threads_share_a_launch() -> None:
    """Each has arguments of its own: a launch copies them when it is called, not before."""
    made = [Copy(by(pool(), [n, 11 - n, 5, 0]), chunk(4), 4) for n in range(4)]
    launch, wrong = emulated().prepare(made[0].plan()), []

    def work(copied: Copy) -> None:
        src, dst = copied.src, copied.dst
        try:
            for _ in range(50):
                copied.check(
                    lambda: launch(src.view(), dst.view(), src.index(), dst.index(), 4, None, None)
                )
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(copied,)) for copied in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What a bug in the kernel's words for AMD replaces, and a copy that must show it.
BUGS = {
    "16 bytes are read as 4": ("__attribute__((vector_size(16)))", "", "gather"),
    "stores go elsewhere": ("V*)targets[nth] =", "V*)(targets[nth] + 16) =", "one plane"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    phrase, wrong, name = BUGS[bug]
    text = rows_kernel.kernel_text()
    assert phrase in text
    monkeypatch.setattr(rows_kernel, "kernel_text", lambda *_: text.replace(phrase, wrong))
    with pytest.raises(AssertionError):
        judged(COPIES[name]())
