# SPDX-License-Identifier: Apache-2.0
"""A worker's copies use one thread of torch, and no other thread notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.interrupts import in_other_thread
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import KVView
from portakv.copy.inside import copy_checked
from portakv.runtime.resources import one_thread
from portakv.storage import BlockForm, BlockStore, memory

KEYS = [key_of(i) for i in range(4)]


@pytest.fixture
def many() -> Any:
    """Have torch use several threads, also on a machine with one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def test_one_thread_is_the_calling_threads_alone(many: int) -> None:
    def work() -> list[int]:
        seen = [torch.get_num_threads()]
        with one_thread():
            seen.append(torch.get_num_threads())
            with one_thread():
                seen.append(torch.get_num_threads())
            seen.append(torch.get_num_threads())
            seen.append(in_other_thread(torch.get_num_threads))
        with pytest.raises(ValueError, match="as planned"), one_thread():
            raise ValueError("as planned")
        return [*seen, torch.get_num_threads()]

    assert in_other_thread(work) == [many, 1, 1, 1, many, many]
    assert torch.get_num_threads() == many


@pytest.mark.parametrize("limited", [True, False])
def test_copies_of_a_stores_workers_use_no_other_thread(
    limited: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the limit each worker uses all: the negative control."""
    seen = list[tuple[bool, int]]()

    def noting(*arguments: Any, **terms: Any) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        seen.append((is_main, torch.get_num_threads()))
        return copy_checked(*arguments, **terms)

    monkeypatch.setattr(memory, "copy_checked", noting)

    @contextmanager
    def of_many() -> Iterator[None]:
        torch.set_num_threads(many)  # other tests may have begun this helper with another number
        with one_thread() if limited else nullcontext():
            yield

    monkeypatch.setattr(memory, "one_thread", of_many)
    view = KVView(torch.zeros(2, 4, 2, 4, 16), "layer block kv token (head dim)", heads=2)
    with BlockStore(BlockForm.of(view, model="m"), staging=1 << 20, host=1 << 20) as store:
        store.save(view, [0, 1, 2, 3], KEYS).synchronize(LIMIT)
    assert {threads for is_main, threads in seen if not is_main} == {1 if limited else many}
    assert {threads for is_main, threads in seen if is_main} <= {many}
