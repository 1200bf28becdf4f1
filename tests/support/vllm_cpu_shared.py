# SPDX-License-Identifier: Apache-2.0
"""Real engines over one server or bucket: blocks that they leave, wait for and lose."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

from portakv.storage import prefix_keys
from support.vllm_cpu import Engine, await_that, connector_here, in_a_child


def leave_blocks(
    model: Path,
    store: dict[str, Any],
    prompts: list[list[int]],
    ranks: int = 1,
    stages: int = 1,
    **more: Any,
) -> None:
    """Run an engine that saves the blocks of prompts, and is killed."""

    def killed() -> None:
        engine = Engine(model, store, ranks=ranks, stages=stages, **more)
        engine.join()
        engine.ask(prompts)
        engine.forget()  # the saves have ended
        await_blocks(engine, prompts)
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)


def await_blocks(engine: Engine, prompts: list[list[int]]) -> None:
    """Wait until an engine's index lists the blocks of prompts."""
    index = engine.connector.index

    def lists_all() -> bool:
        return all(index.leading(keys) == len(keys) for keys in wanted)

    size = engine.stored_size
    wanted = [prefix_keys(each[: len(each) // size * size], block_size=size) for each in prompts]
    await_that(lists_all)


def lose_a_block(worker: Any, reports: bool) -> None:
    """Let the fourth block of each load not land in the second rank or stage."""
    if worker.rank != 1:
        return
    kept: Any = importlib.import_module("portakv.serving.server.client")
    load = kept.ServerBlocks.load

    def load_others(self: Any, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
        some = [*keys]
        some[3] = bytes(32)
        return load(self, view, blocks, some, **terms)

    kept.ServerBlocks.load = load_others
    if not reports:
        connector_here().get_block_ids_with_load_errors = set
