# SPDX-License-Identifier: Apache-2.0
"""vLLM's own offloading through host memory into files, in an engine on a CPU.

vLLM refuses a worker on a CPU. Its worker runs here with what it lacks: a copy of pages, streams
and events. All else is vLLM's: which bytes go where, the memory that workers share, the managers,
the tiers, and the names of files.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from support.vllm_cpu import OnACpu

MODULE = __name__
#: Streams and events of a worker; each job takes three and gives them back.
_MANY = 4096


def _copy_pages(sources: Any, targets: Any, sizes: Any, **_: Any) -> None:
    """Copy pages of host memory, in place of vLLM's op for devices."""
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)


class TieringOnACpu(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers, with vLLM's worker on a CPU."""

    _worker: Any

    def get_worker(self, kv_caches: Any) -> Any:
        """Return the worker, made at the first call. vLLM's own method refuses a CPU."""
        if self._worker is None:
            with pytest.MonkeyPatch.context() as patch:
                # The worker asserts that caches lie on a device.
                patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
                self._worker = self.create_worker(kv_caches)
            own = vars(self._worker)
            for handler in (own["_store_handler"], own["_load_handler"]):
                vars(handler).update(
                    _swap_blocks_batch=_copy_pages,
                    _stream_pool=[OnACpu()] * _MANY,
                    _event_pool=[OnACpu()] * _MANY,
                )
        return self._worker
