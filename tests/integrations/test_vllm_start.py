# SPDX-License-Identifier: Apache-2.0
"""The start of the integration's worker inside the real vLLM: what is copied and refused then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; see .ci/plugs", allow_module_level=True)

from support.guarded_memory import refused
from support.vllm_cases import Caches

from portakv import BackendUnavailable, BlockTransfer, InvalidTerms, KVView, copy_rows
from portakv.integrations.vllm import offloading
from portakv.integrations.vllm.offloading import PortaKVOffloadingWorker

Make = Callable[..., PortaKVOffloadingWorker]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make workers, and shut them down."""
    made: list[PortaKVOffloadingWorker] = []

    def worker(caches: Caches, blocks_per_chunk: int = 1, chunks: int = 9, **options: Any) -> Any:
        made.append(
            PortaKVOffloadingWorker(caches.canonical(), blocks_per_chunk, chunks, **options)
        )
        return made[-1]

    yield worker
    for each in made:
        each.shutdown()


def test_a_worker_has_copied_before_its_first_job(
    device: torch.device, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions, a page and more than `WARM_UP` bytes; the caches keep their bytes."""
    caches = Caches(device, [256 << 10, 96], [[0], [1]], blocks=80)
    recorded: list[tuple[str, int]] = []

    def copy(src: KVView, dst: KVView, *ids: Any, count: int, **terms: Any) -> BlockTransfer:
        recorded.append((src.layout.text, count))
        return copy_rows(src, dst, *ids, count=count, **terms)

    monkeypatch.setattr(offloading, "copy_rows", copy)
    make(caches, chunks=99)
    down = "layer | block head (token dim)"
    up = "layer | block token head dim"
    first = [(down, 1), (up, 1), (up, 1), (down, 65), (up, 65), (up, 65)]
    assert recorded == [*first, *((side, 1 if count == 1 else 80) for side, count in first)]
    for tensor, before in zip(caches.tensors, caches.before, strict=True):
        assert torch.equal(tensor.cpu(), before)


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"backend": "nope"}, BackendUnavailable),
        ({"max_thread_blocks": -1}, InvalidTerms),
        ({"overlap": "nope"}, InvalidTerms),
        ({"max_gbps": 0}, InvalidTerms),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunks", [9, 0])
def test_terms_are_judged_at_the_start(
    device: torch.device, make: Make, terms: Any, error: Any, chunks: int
) -> None:
    """And not by the first store, when the engine runs."""
    with refused(error, *map(str, terms.values())):
        make(Caches(device, [64], [[0]]), 1, chunks, terms=terms)
