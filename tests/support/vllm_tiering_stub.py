# SPDX-License-Identifier: Apache-2.0
"""A stand-in of vLLM's tiers: what PortaKV's tier uses of the modules that it imports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

_OFFLOAD = "vllm/v1/kv_offload"
MODULES = {
    "vllm/platforms": """
from types import SimpleNamespace

current_platform = SimpleNamespace(device_type="cpu")
""",
    "vllm/distributed/kv_transfer/kv_connector/v1/offloading/metrics": """
class OffloadingConnectorStats:
    def __init__(self):
        self.gauges = {}
        self.counters = {}

    def set_gauge(self, name, value, labels):
        self.gauges[(name, *labels)] = value

    def increase_counter(self, name, value, labels):
        self.counters[(name, *labels)] = value
""",
    f"{_OFFLOAD}/base": """
import enum
from dataclasses import dataclass
from typing import Any

OffloadingWorker = object
TransferResult = tuple

class Locality(enum.Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"

class Medium(enum.Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"

class LookupResult(enum.Enum):
    MISS = 0
    HIT = 1
    RETRY = 2

@dataclass
class OffloadingMetricMetadata:
    documentation: str
    labelnames: tuple = ()

OffloadingCounterMetadata = OffloadingGaugeMetadata = OffloadingMetricMetadata

@dataclass
class OffloadingEvent:
    keys: list
    medium: Medium
    removed: bool
    locality: Any = None

class RequestOffloadingContext:
    pass
""",
    f"{_OFFLOAD}/cpu/gpu_worker": "def pin_mmap_region(region):\n    raise AssertionError\n",
    f"{_OFFLOAD}/cpu/spec": """
class CPUOffloadingSpec:
    def __init__(self, config):
        self.config = config
        self.extra_config = config.extra_config
""",
    f"{_OFFLOAD}/file_mapper": """
class FileMapper:
    rank = 0

    def __init__(self, model, ranks):
        self.model = model
        self.ranks = ranks

    @classmethod
    def from_offloading_spec(cls, root_dir, spec, blocks_per_file, parallel_agnostic):
        ranks = 1 if parallel_agnostic else spec.config.parallel.tp_size
        return cls(spec.config.model.name, ranks)

    def get_run_config(self):
        return {"model_name": self.model, "tp_size": self.ranks}
""",
    f"{_OFFLOAD}/tiering/base": """
from dataclasses import dataclass
from typing import Any

@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: Any = None
    transfer_bytes: Any = None

class SecondaryTierManager:
    def __init__(self, spec, view, tier_type, detector=None):
        self.tier_type = tier_type
        self.bp_detector = detector
""",
    f"{_OFFLOAD}/tiering/spec": """
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

class TieringOffloadingSpec(CPUOffloadingSpec):
    pass
""",
}


def write_vllm_with_tiers(folder: Path) -> None:
    """Write a module ``vllm`` with the tiers' classes alone, and the metadata of a release."""
    for name, text in MODULES.items():
        at = (folder / name).with_suffix(".py")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)
        for package in at.relative_to(folder).parents:
            if package.name:
                (folder / package / "__init__.py").touch()
    info = folder / "vllm-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")


def spec_of(
    events: bool = False,
    layout: str = "NHD",
    model: str = "model",
    ranks: int = 1,
    canonical: bool = False,
) -> Any:
    """Return what a tier reads of vLLM's spec."""
    return SimpleNamespace(
        blocks_per_chunk=1,
        kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
        config=SimpleNamespace(
            model=SimpleNamespace(name=model),
            kv_cache_layout=layout,
            canonical_layout=canonical,
            parallel=SimpleNamespace(tp_size=ranks),
        ),
    )
