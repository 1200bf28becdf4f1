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


#: Tokens of a block of the engines that start with a configuration below.
BLOCK = 32
#: Changes of PortaKV's terms with which no engine starts, by what is wrong with them. Each folder
#: that is not named is one that can be written.
WRONG_TERMS: dict[str, dict[str, Any]] = {
    "no room in staging": {"staging": 1 << 10},
    "ten bytes of staging": {"staging": 10},
    "blocks that do not fit": {"block_size": 48},
    "blocks of no engine": {"block_size": 50},
    "packed blocks of another size": {"block_size": 64, "encoding": "pack"},
    "no room on the disk": {"capacity": 1 << 10},
    "no disk": {"capacity": 0},
    "a byte of disk": {"capacity": 1.5},
    "a folder in /proc": {"folder": "/proc/x"},
    "a folder in /sys": {"folder": "/sys/x/y"},
    "a folder below a file": {"folder": "/proc/version/x"},
    "no host": {"folder": None, "host": 0},
    "a little host": {"folder": None, "host": 1 << 10},
    "an unknown term": {"foler": "x"},
}
#: Changes of vLLM's keys with which no engine starts.
WRONG_KEYS: dict[str, dict[str, Any]] = {
    "another policy": {"kv_load_failure_policy": "retry"},
    "a list of terms": {"kv_connector_extra_config": []},
    "no terms": {"kv_connector_extra_config": None},
    "a number as a name": {"engine_id": 5},
    "a number as a device": {"kv_buffer_device": 5},
    "a module that is no text": {"kv_connector_module_path": 5},
    "no role": {"kv_role": None},
    "another role": {"kv_role": "kv_neither"},
    "another key": {"kv_rol": "kv_both"},
}
