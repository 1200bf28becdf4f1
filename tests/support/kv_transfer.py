# SPDX-License-Identifier: Apache-2.0
"""The ``--kv-transfer-config`` of vLLM's tutorial."""

from __future__ import annotations

from typing import Any


def right(**terms: Any) -> dict[str, Any]:
    """Return a configuration with which an engine starts."""
    return {
        "kv_connector": "PortaKVConnector",
        "kv_connector_module_path": "portakv.integrations.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": terms,
    }
