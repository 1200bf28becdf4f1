# SPDX-License-Identifier: Apache-2.0
"""A fault for the workers of an engine: each of its ranks offers its heads as those of another one.

An engine imports this module in its workers if ``worker_extension_cls`` names the class.
"""

from __future__ import annotations

import importlib
from typing import Any

ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
_heads_of = ranks.heads_of


def _swapped(config: Any, number: int, view: Any) -> Any:
    """Return the heads of the rank in the opposite place."""
    size = getattr(config.parallel_config, "tensor_parallel_size", 1)
    return _heads_of(config, size - 1 - number, view)


ranks.heads_of = _swapped


class SwappedHeads:
    """What vLLM adds to its class of workers: nothing."""
