# SPDX-License-Identifier: Apache-2.0
"""A fault for the workers of an engine: each of its ranks offers its heads as those of another one.

An engine imports this module in its workers if ``worker_extension_cls`` names the class.
"""

from __future__ import annotations

from typing import Any

from portakv.integrations.vllm import ranks

_part: Any = ranks.Rank.part


def _swapped(self: ranks.Rank, *args: Any, **terms: Any) -> Any:
    """Return the heads of the rank in the opposite place."""
    return _part(self._replace(number=self.size - 1 - self.number), *args, **terms)


ranks.Rank.part = _swapped  # type: ignore[method-assign]


class SwappedHeads:
    """What vLLM adds to its class of workers: nothing."""
