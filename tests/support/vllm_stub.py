# SPDX-License-Identifier: Apache-2.0
"""A stand-in of vLLM: the classes that connectors derive from, and an engine's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from portakv.integrations.vllm.check import KEYS
from support.stand_ins import imported_with

BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
#: The modules of PortaKV that import vLLM, and those of the tests that import them.
IMPORTERS = (
    "portakv.integrations.vllm.ranks",
    "portakv.integrations.vllm.metrics",
    "portakv.integrations.vllm.connector",
    "portakv.integrations.vllm_connector",
    "support.vllm_hooks",
)
#: Likewise, with the witness and what the tests wrap by it.
WITNESS_IMPORTERS = (
    "portakv.integrations.vllm.metrics",
    "portakv.integrations.vllm.witness",
    "support.witness_double",
)
#: The classes of vLLM's module, with what the connector uses of them.
CLASSES = """
import enum

class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1

class KVConnectorHandshakeMetadata:
    pass

class KVConnectorMetadata:
    pass

class KVConnectorWorkerMetadata:
    pass

class SupportsHMA:
    pass

class KVConnectorTransferResults:
    def __init__(self, sent, received):
        self.finished_sending = sent
        self.finished_recving = received
        self.failed_recving = set()

class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self.role = role
        self._connector_metadata = None

    def bind_connector_metadata(self, metadata):
        self._connector_metadata = metadata

    def has_connector_metadata(self):
        return self._connector_metadata is not None

    def _get_connector_metadata(self):
        return self._connector_metadata

    def clear_connector_metadata(self):
        self._connector_metadata = None

    def bind_gpu_block_pool(self, gpu_block_pool):
        return

    def bind_kv_cache_manager(self, kv_cache_manager):
        return

    def set_host_xfer_buffer_ops(self, copy_operation):
        return

    def get_mem_pool_context(self):
        return None

    def get_finished_count(self):
        return None

    def get_loaded_kv_cache_group_ids(self, request):
        return ()

    def get_kv_connector_kv_cache_events(self):
        return None

    def get_transfer_results(self, finished_req_ids):
        sent, received = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(set(sent or ()), set(received or ()))
"""
FACTORY = "vllm/distributed/kv_transfer/kv_connector/factory.py"
#: The class of vLLM's module that finds connectors.
CLASSES_OF_FACTORY = """
from importlib import import_module

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

class KVConnectorFactory:
    @classmethod
    def get_connector_class(cls, config):
        return getattr(import_module(config.kv_connector_module_path), config.kv_connector)

    @classmethod
    def supports_hma_config(cls, config):
        return issubclass(cls.get_connector_class(config), SupportsHMA)
"""
TRANSFERS = "vllm/config/kv_transfer.py"
#: The class of vLLM's module with the keys of a configuration.
CLASSES_OF_TRANSFERS = """
class KVTransferConfig:
    def __init__(self, **terms):
        vars(self).update(terms)

"""
METRICS = "vllm/distributed/kv_transfer/kv_connector/v1/metrics.py"
#: The classes of vLLM's module of figures, with what the connector uses of them.
CLASSES_OF_METRICS = """
from dataclasses import dataclass, field

@dataclass
class KVConnectorStats:
    data: dict = field(default_factory=dict)

class KVConnectorPromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        self._counter_cls = metric_types["counter"]
        self._gauge_cls = metric_types["gauge"]
"""


def write_vllm(folder: Path) -> None:
    """Write a module ``vllm`` that has the base classes alone, and the metadata of a release."""
    at = folder / BASE
    at.parent.mkdir(parents=True)
    for package in (*at.relative_to(folder).parents,):
        if package.name:
            (folder / package / "__init__.py").write_text("")
    at.write_text(CLASSES)
    (folder / METRICS).write_text(CLASSES_OF_METRICS)
    ranks = (
        "import os\n\n\ndef get_tensor_model_parallel_rank():\n    return int(os.environ['RANK'])\n"
    )
    (folder / "vllm/distributed/__init__.py").write_text(ranks)
    steps = folder / "vllm/v1/core/sched/output.py"
    steps.parent.mkdir(parents=True)
    steps.write_text("class SchedulerOutput:\n    pass\n")
    info = folder / "vllm-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")


def write_factory(folder: Path) -> None:
    """Add the classes by which vLLM finds a connector to `write_vllm`'s."""
    (folder / FACTORY).write_text(CLASSES_OF_FACTORY)
    transfers = folder / TRANSFERS
    transfers.parent.mkdir()
    (transfers.parent / "__init__.py").write_text("")
    fields = "".join(f"    {name} = None\n" for name in KEYS)
    transfers.write_text(CLASSES_OF_TRANSFERS + fields)


@contextmanager
def imported(folder: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Import the connector and `support.vllm_hooks` with the stand-in, which is written there.

    All of them are forgotten at the end.
    """
    write_vllm(folder)
    with imported_with(folder, "vllm", IMPORTERS) as (_, _, connector, _, hooks):
        yield connector, hooks


class FullAttentionSpec(SimpleNamespace):
    """What a group of layers is called in vLLM."""


class SlidingWindowSpec(SimpleNamespace):
    """What a group of layers with a window is called in vLLM."""


def configuration(
    folder: str, name: str, blocks: int, size: int, window: int | None = None
) -> tuple[Any, Any]:
    """Return the two configurations that a connector is made with.

    ``window``: that of the group of layers; None: full attention.
    """
    terms = {"folder": folder, "host": 1 << 16, "staging": 1 << 16, "capacity": 1 << 20}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1),
        model_config=SimpleNamespace(model="model", revision=None, quantization=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(engine_id=name, kv_connector_extra_config=terms),
    )
    shape = {"block_size": size, "num_kv_heads": 1, "head_size": 1}
    spec: Any = FullAttentionSpec(**shape)
    if window is not None:
        spec = SlidingWindowSpec(**shape, sliding_window=window)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
    return config, SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group])
