# SPDX-License-Identifier: Apache-2.0
"""A stand-in of vLLM: the classes that connectors derive from, and an engine's configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
#: The classes of vLLM's module, with what the connector uses of them.
CLASSES = """
import enum

class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1

class KVConnectorMetadata:
    pass

class KVConnectorWorkerMetadata:
    pass

class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_cache_config = kv_cache_config
        self._connector_metadata = None

    def bind_connector_metadata(self, metadata):
        self._connector_metadata = metadata

    def _get_connector_metadata(self):
        return self._connector_metadata
"""


def write_vllm(folder: Path) -> None:
    """Write a module ``vllm`` that has the base classes alone, and the metadata of a release."""
    at = folder / BASE
    at.parent.mkdir(parents=True)
    for package in (*at.relative_to(folder).parents,):
        if package.name:
            (folder / package / "__init__.py").write_text("")
    at.write_text(CLASSES)
    info = folder / "vllm-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")


class FullAttentionSpec(SimpleNamespace):
    """What a group of layers is called in vLLM."""


def configuration(folder: str, name: str, blocks: int, size: int) -> tuple[Any, Any]:
    """Return the two configurations that a connector is made with."""
    terms = {"folder": folder, "host": 1 << 16, "staging": 1 << 16, "capacity": 1 << 20}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        model_config=SimpleNamespace(model="model", revision=None, quantization=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(engine_id=name, kv_connector_extra_config=terms),
    )
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(block_size=size))
    return config, SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group])
