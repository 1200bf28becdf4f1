# SPDX-License-Identifier: Apache-2.0
"""Two engines that hand requests over by the hooks of vLLM's connector, without vLLM.

`python -m support.vllm_handover_hooks` prints what has happened, as JSON. A module ``vllm`` as
`vllm_stub.write_vllm` makes it must be found.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from portakv.integrations.vllm import connector
from portakv.integrations.vllm.connector import PortaKVConnector
from support.vllm_stub import configuration
from support.waits import LIMIT

#: What lines of the engine begin with. vLLM configures no logger but its own.
FORMAT = "vLLM %(levelname)s %(name)s: %(message)s"
BLOCKS = 10
PROMPT = [*range(100, 140)]
Role: Any = connector.KVConnectorRole  # type: ignore[attr-defined]


class FlashAttentionBackend:
    """An attention backend whose rows PortaKV can read."""


FlashAttentionBackend.__module__ = "vllm.v1.attention.backends.flash_attn"


class Side:
    """The two connectors of an engine with one worker.

    Attributes:
        received, sent: what the worker has reported to vLLM.
        invalid: the engine's blocks without rows of their own.
    """

    def __init__(self, role: str, size: int, **extra: Any) -> None:
        config, caches = configuration("", role, BLOCKS, size)
        config.kv_transfer_config.kv_role = role
        config.kv_transfer_config.kv_connector_extra_config = extra
        layer = SimpleNamespace(get_attn_backend=lambda: FlashAttentionBackend)
        context = {"layer": layer}
        config.compilation_config = SimpleNamespace(static_forward_context=context)
        self.memory = torch.zeros(BLOCKS, 1, size, 2, dtype=torch.float32, device="cpu")
        self.worker = PortaKVConnector(config, Role.WORKER, caches)
        self.worker.register_kv_caches({"layer": self.memory})
        self.scheduler = PortaKVConnector(config, Role.SCHEDULER, caches)
        metadata = self.worker.get_handshake_metadata()
        if metadata is not None:
            self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})
        self.received = set[str]()
        self.sent = set[str]()
        self.invalid = set[int]()

    def rows(self, blocks: list[int]) -> torch.Tensor:
        """Return the rows of the prompt in blocks, ``[token, kv]``."""
        return self.memory[blocks].flatten(0, 2)[: len(PROMPT)]

    def step(self) -> None:
        """Make a step of the engine that computes nothing."""
        cached = SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[]
        )
        output = SimpleNamespace(
            num_scheduled_tokens={},
            preempted_req_ids=None,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
        )
        worker = self.worker
        metadata = self.scheduler.build_connector_meta(output)
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(set())
        self.invalid |= worker.get_block_ids_with_load_errors()
        self.received |= results.finished_recving
        self.sent |= results.finished_sending
        said = SimpleNamespace(
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
            finished_sending=results.finished_sending,
        )
        self.scheduler.update_connector_output(said)

    def until(self, happened: Callable[[], object]) -> None:
        """Make steps until something has happened."""
        until = time.monotonic() + LIMIT
        while not happened():
            assert time.monotonic() < until, self.scheduler.statistics()
            self.step()

    def pull(self, name: str, blocks: list[int], params: dict[str, Any]) -> tuple[int, bool]:
        """Let a request of the prompt pull its rows; return what the scheduler was offered."""
        request = request_of(name, params)
        self.scheduler.on_new_request(request)
        tokens, later = self.scheduler.get_num_new_matched_tokens(request, 0)
        assert tokens is not None
        taken = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.scheduler.update_state_after_alloc(request, taken, tokens)
        if tokens:
            self.until(lambda: name in self.received)
        return tokens, later


class Firsts:
    """What a process makes for the first time: modules that it imports, threads that it starts."""

    def __init__(self) -> None:
        self._modules = {*sys.modules}
        self._threads = list[str]()
        kind: Any = threading.Thread
        start = kind.start

        def noted(thread: threading.Thread) -> None:
            self._threads.append(thread.name)
            start(thread)

        kind.start = noted

    def take(self) -> list[str]:
        """Return what is new since the last call."""
        made = [*sorted({*sys.modules} - self._modules), *self._threads]
        self._modules = {*sys.modules}
        self._threads.clear()
        return made


def request_of(name: str, params: dict[str, Any] | None) -> Any:
    """Return a request of the prompt."""
    return SimpleNamespace(
        request_id=name,
        all_token_ids=[*PROMPT],
        prompt_token_ids=PROMPT,
        num_computed_tokens=len(PROMPT),
        status=SimpleNamespace(name="FINISHED_LENGTH_CAPPED"),
        kv_transfer_params=params,
        cache_salt=None,
        lora_request=None,
        mm_features=[],
    )


def log_as_vllm() -> None:
    """Configure the logger of vLLM alone, as vLLM does."""
    engine = logging.getLogger("vllm")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    engine.addHandler(handler)
    engine.setLevel(logging.INFO)
    engine.propagate = False


def main() -> None:
    """Hand a prompt over, use its ticket again, and a ticket of another prompt."""
    log_as_vllm()
    firsts = Firsts()
    prefill = Side("kv_producer", 16)
    decode = Side("kv_consumer", 8, hand_over={"timeout": 50.0})
    source = [3, 7, 2]
    rows = torch.arange(3 * 16 * 2, dtype=torch.float32, device="cpu").view(3, 1, 16, 2)
    blank = [bool(side.memory.any()) for side in (prefill, decode)]
    at_start = firsts.take()
    prefill.memory[source] = rows

    request = request_of("p", {"do_remote_decode": True})
    prefill.scheduler.on_new_request(request)
    retained, params = prefill.scheduler.request_finished_all_groups(request, (source,))
    passed = json.loads(json.dumps(params))
    prefill.step()

    into = [1, 2, 3, 4, 5]
    offered = decode.pull("d", into, passed)
    right = torch.equal(decode.rows(into), prefill.rows(source))
    prefill_sent = [*prefill.sent]
    decode.step()  # the rows are released
    prefill.until(lambda: prefill.sent)
    later = firsts.take()
    failed = [*decode.invalid]
    decode.pull("again", [6, 7, 8, 9, 1], passed)

    wrong = {**passed, "portakv": {**passed["portakv"], "prompt": "another"}}
    other = decode.pull("wrong", into, wrong)
    ended = prefill.scheduler.request_finished_all_groups(request_of("q", None), (source,))
    stores = Side("kv_both", 16, host=1 << 20, staging=1 << 20)
    stores.pull("computed", [1, 2, 3], {})
    # vLLM calls the hook again without a lookup when a load has ended.
    taken = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3],))
    stores.scheduler.update_state_after_alloc(request_of("computed", {}), taken, 0)
    computed = stores.scheduler.scheduler_side.statistics()["computed"]
    print(
        json.dumps(
            {
                "retained": retained,
                "keys": sorted(passed),
                "computed": computed,
                "at_start": at_start,
                "later": later,
                "blank": blank,
                "offered": offered,
                "right": right,
                "sent": [prefill_sent, sorted(prefill.sent)],
                "failed": [failed, sorted(decode.invalid)],
                "other": other,
                "ended": ended,
                "delivers": [x.scheduler.requires_kv_delivery for x in (prefill, decode)],
                "prefill": prefill.scheduler.scheduler_side.statistics(),
                "decode": decode.scheduler.scheduler_side.statistics(),
            }
        )
    )
    for side in (decode, prefill, stores):
        side.worker.shutdown()


if __name__ == "__main__":
    main()
