# SPDX-License-Identifier: Apache-2.0
"""Loads by layer through the hooks of vLLM's worker, without vLLM, whose layers wait by words.

`python -m support.vllm_graph_hooks FOLDER` prints what the hooks answer. A module ``vllm`` as
`vllm_stub.write_vllm` makes it must be found.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from portakv.integrations.vllm import connector as vllm_connector
from portakv.integrations.vllm.connector import PlanMetadata, PortaKVConnector
from portakv.serving import Job, Plan
from portakv.storage import prefix_keys
from support.vllm_stub import configuration

NAMES = ["layer 0", "layer 1", "layer 2"]
SIZE = 64
Role: Any = vllm_connector.KVConnectorRole  # type: ignore[attr-defined]


def step(connector: Connector, plan: Plan, caches: dict[str, torch.Tensor]) -> list[Any]:
    """Make a step of a plan; return for each layer what the model reads of block 2."""
    connector.bind_connector_metadata(PlanMetadata(plan))
    connector.start_load_kv(None)
    seen = list[Any]()
    for name, layer in caches.items():
        connector.wait_for_layer_load(name)
        seen.append(sorted(set(layer[2].flatten().tolist())))
    connector.wait_for_save()
    while connector.worker_side.busy:
        connector.get_finished([])
    connector.clear()
    return seen


class Connector(PortaKVConnector):
    """The connector, which a test can leave without metadata, as outside of steps."""

    def clear(self) -> None:
        self._connector_metadata = None


def main() -> None:
    config, shape = configuration(sys.argv[1], "graphs", 8, SIZE)
    shape.kv_cache_groups[0].layer_names = NAMES
    terms = config.kv_transfer_config.kv_connector_extra_config
    terms["by_layer"] = "graph"
    terms["staging"] = terms["host"] = 1 << 18
    connector = Connector(config, Role.WORKER, shape)
    before = connector.has_connector_metadata()
    caches = {
        name: torch.full((8, 2, SIZE), at, dtype=torch.int64) for at, name in enumerate(NAMES)
    }
    connector.register_kv_caches(caches)
    keys = tuple(prefix_keys(range(SIZE), SIZE))
    step(connector, Plan(saves=[Job(1, "a", keys, 0, None, ((1,),))]), caches)
    for layer in caches.values():
        layer[2] = -1
    seen = step(connector, Plan(loads=[Job(2, "a", keys, 0, None, ((2,),))]), caches)
    answers = {
        "waits by words": connector.store.words is not None,
        "metadata": [before, connector.has_connector_metadata()],
        "piecewise": [
            PortaKVConnector.requires_piecewise_for_cudagraph({"by_layer": each})
            for each in (False, True, "graph")
        ],
        "seen": seen,
    }
    connector.shutdown()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
