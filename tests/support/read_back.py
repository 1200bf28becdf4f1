# SPDX-License-Identifier: Apache-2.0
"""A record of torch's ops that the host waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ReadBack(TorchDispatchMode):
    """Notes the ops whose results the host waits for."""

    WAITING = ("nonzero", "_local_scalar_dense", "unique")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        away = (
            isinstance(answer, torch.Tensor)
            and answer.is_cpu
            and any(not x.is_cpu for x in tensors)
        )
        if away or (name in self.WAITING and not all(x.is_cpu for x in tensors)):
            self.seen.append(name)
        return answer
