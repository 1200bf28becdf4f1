# SPDX-License-Identifier: Apache-2.0
"""The calls of a serving engine: `AdaptiveConnector` over registered caches."""

from portakv.connector.connector import CHUNK_LAYOUT, KV_LAYOUT, AdaptiveConnector

__all__ = ["CHUNK_LAYOUT", "KV_LAYOUT", "AdaptiveConnector"]
