# SPDX-License-Identifier: Apache-2.0
"""Copies of a real vLLM engine by data parallelism on a CPU, as `vllm serve -dp 2` runs them.

Each copy is a process with a worker in another one, and vLLM's coordinator is a process too. The
caller is the process of the server, which chooses a copy for each request.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portakv.serving.local import TOKENS
from portakv.storage import prefix_keys
from support.vllm_cpu import (
    BLOCK,
    SMALL,
    Answer,
    await_that,
    connector_terms,
    fork_workers,
    prompt,
    store_as_on_an_accelerator,
)
from support.waits import LIMIT

#: The beginning of the names of requests whose blocks another copy has stored.
KNOWN = "known"


def fork_copies() -> None:
    """Let vLLM fork its engines, which have imported it then. It spawns them on a CPU."""
    for name in ("vllm.v1.engine.utils", "vllm.v1.engine.coordinator"):
        module: Any = importlib.import_module(name)
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    fork_workers()


def await_known_blocks() -> None:
    """Let schedulers wait for the blocks of `KNOWN` requests, which their index lists a moment
    after another copy has stored them."""
    module: Any = importlib.import_module("portakv.integrations.vllm.connector")
    matched = module.PortaKVConnector.get_num_new_matched_tokens

    def wait(self: Any, request: Any, computed: int) -> Any:
        if request.request_id.startswith(KNOWN):
            tokens = request.prompt_token_ids
            keys = prefix_keys(tokens[: len(tokens) // TOKENS * TOKENS], block_size=TOKENS)
            await_that(lambda: self.index.leading(keys) == len(keys))
        return matched(self, request, computed)

    module.PortaKVConnector.get_num_new_matched_tokens = wait


class Copies:
    """Two copies of an engine that have a store.

    Args:
        store: the terms of PortaKV's connector.
    """

    def __init__(self, model: Path, store: dict[str, Any]) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        fork_copies()
        store_as_on_an_accelerator()
        terms = AsyncEngineArgs(
            model=str(model),
            data_parallel_size=2,
            block_size=BLOCK,
            kv_transfer_config=KVTransferConfig(**connector_terms(store)),
            **SMALL,
        )
        self._numbers = itertools.count()
        self.llm = AsyncLLM.from_engine_args(terms)

    async def ask(
        self, copy: int, prompts: Sequence[list[int]], tokens: int = 12, name: str = "new"
    ) -> Answer:
        """Return the greedy tokens of prompts that a copy serves together.

        ``name``: the beginning of the requests' names.
        """
        outputs = await asyncio.gather(*[self._ask(copy, each, tokens, name) for each in prompts])
        return Answer(
            [list(each.outputs[0].token_ids) for each in outputs],
            [each.num_cached_tokens or 0 for each in outputs],
        )

    async def _ask(self, copy: int, tokens: list[int], most: int, name: str) -> Any:
        from vllm import SamplingParams

        terms = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
        asked = {"prompt_token_ids": tokens}
        number = f"{name} {next(self._numbers)}"
        outputs = self.llm.generate(asked, terms, number, data_parallel_rank=copy)
        return [each async for each in outputs][-1]

    async def count(self, copy: int, counter: str, least: int) -> int:
        """Return a counter of a copy, once the copy has reported so much."""
        until = time.monotonic() + LIMIT / 2
        while (value := figure_of(copy, counter)) < least:
            assert time.monotonic() < until, f"copy {copy} has reported {value} {counter}"
            await self.ask(copy, [prompt(20, 900 + next(self._numbers))], 2)
        return value


def figure_of(copy: int, counter: str) -> int:
    """Return a counter of a copy of an engine, as Prometheus would read it."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    name = f"vllm:portakv_{counter}"
    return sum(
        each.value
        for each in get_metrics_snapshot()
        if each.name == name and each.labels.get("engine") == str(copy)
    )
