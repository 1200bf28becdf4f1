# SPDX-License-Identifier: Apache-2.0
"""vLLM: the connector, the offloading spec and the tier.

Importing this package imports no engine: each name is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portakv.integrations.vllm.connector import PortaKVConnector as PortaKVConnector
    from portakv.integrations.vllm.offloading import PortaKVOffloadingSpec as PortaKVOffloadingSpec
    from portakv.integrations.vllm.tier import PortaKVTier as PortaKVTier
    from portakv.integrations.vllm.tier import PortaKVTieringSpec as PortaKVTieringSpec

#: The public names, and their modules in this package.
_NAMES = {
    "PortaKVConnector": "connector",
    "PortaKVOffloadingSpec": "offloading",
    "PortaKVTier": "tier",
    "PortaKVTieringSpec": "tier",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
