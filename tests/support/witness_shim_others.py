# SPDX-License-Identifier: Apache-2.0
"""Connectors of other projects that put a fault into the rows of a load when it ends, as those of
`support.witness_shim`."""

from __future__ import annotations

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector

from support.witness_shim import DamagesAtTheEnd


class DamagedLMCacheMP(DamagesAtTheEnd, LMCacheMPConnector):  # type: ignore[misc]
    """LMCache's connector for its server, with faults."""


class DamagedNixl(DamagesAtTheEnd, NixlConnector):  # type: ignore[misc]
    """NIXL's connector, with faults."""
