# SPDX-License-Identifier: Apache-2.0
"""vLLM: the connector, the offloading spec and the tier.

Importing this package imports no engine: each name is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portakv.integrations import lazy_names

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
__getattr__ = lazy_names(__name__, _NAMES)
