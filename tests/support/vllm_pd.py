# SPDX-License-Identifier: Apache-2.0
"""Real engines that hand requests over, step by step: one computes prompts, another goes on.

The engines are children of one process, and tell each other what they need by files of a folder.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.vllm_cpu import Engine, await_that, note
from support.waits import LIMIT

#: What a request carries to the engine that computes its prompt, as vLLM's proxies send it.
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
IDLE = 5e-3  # seconds after a step without tokens, for other processes
#: Files that engines wait for.
STOP = "stop"
HALF = "half of a pull is copied"
GO_ON = "the pull goes on"


class Serving:
    """An engine that is driven step by step.

    Attributes:
        tokens: of each request, as far as they have come.
        params: what each request that has ended carries on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens = dict[str, list[int]]()
        self.params = dict[str, Any]()

    def add(
        self, name: str, prompt: list[int], tokens: int = 12, params: dict[str, Any] | None = None
    ) -> None:
        """Add a request."""
        from vllm import SamplingParams

        terms = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        self.tokens[name] = []
        self.params.pop(name, None)
        self.engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, terms)

    def step(self) -> None:
        """Let the engine make a step, if it has anything to do."""
        outputs = self.engine.llm.llm_engine.step()
        for output in outputs:
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
            if output.finished:
                self.params[output.request_id] = output.kv_transfer_params
        if not outputs:
            time.sleep(IDLE)

    def until(self, happened: Callable[[], Any], what: str) -> None:
        """Make steps until something has happened."""
        until = time.monotonic() + LIMIT
        while not happened():
            assert time.monotonic() < until, f"not in time: {what}; {self.engine.counts}"
            self.step()

    def answer(
        self, name: str, prompt: list[int], params: dict[str, Any] | None = None, tokens: int = 12
    ) -> list[int]:
        """Return the tokens of a request."""
        self.add(name, prompt, tokens, params)
        self.until(lambda: name in self.params, f"the answer to {name}")
        return self.tokens[name]

    def forget(self) -> None:
        """Clear the prefix cache, once no block is held."""
        self.until(self.engine.llm.reset_prefix_cache, "blocks are freed")


def compute_prompts(
    serving: Serving, folder: Path, prompts: Sequence[list[int]], tokens: int = 1
) -> None:
    """Compute prompts together for another engine, which learns of each as it ends, and go on until
    that engine says so. ``tokens``: that this engine generates of each."""
    for number, prompt in enumerate(prompts):
        serving.add(f"p{number}", prompt, tokens, TO_PREFILL)
    told = set[str]()

    def has_stopped() -> bool:
        for name in serving.params.keys() - told:
            told.add(name)
            note(folder / name, json.dumps(serving.params[name]))
        return (folder / STOP).exists()

    serving.until(has_stopped, "the decode engine")


def carried(folder: Path, number: int) -> Any:
    """Wait for a prompt to be computed, and return what its request carries."""
    file = folder / f"p{number}"
    await_that(file.exists)
    return json.loads(file.read_text())


def go_on_with(
    serving: Serving, folder: Path, prompts: Sequence[list[int]], name: str = "d"
) -> list[list[int]]:
    """Return the tokens of prompts that another engine computes, as they come."""
    return [
        serving.answer(f"{name}{number}", prompt, carried(folder, number))
        for number, prompt in enumerate(prompts)
    ]


def stop_halfway(folder: Path) -> None:
    """Let each pull of this process copy half of the layers, and the others when it may go on, or
    was stopped. Call it after the start of the engine, which rehearses a pull."""
    reader = vars(importlib.import_module("portakv.migrate.reader"))
    copy = reader["_copy_here"]

    def copy_halves(step: Any, layers: range, pull: Any, options: Any) -> None:
        middle = step.cut.dst.layers // 2
        first = range(layers.start, min(layers.stop, middle))
        rest = range(max(layers.start, middle), layers.stop)
        if first:
            copy(step, first, pull, options)
        if rest:
            note(folder / HALF)
            until = time.monotonic() + LIMIT
            while not (pull.over or (folder / GO_ON).exists()):
                assert time.monotonic() < until, "the pull may not go on"
                time.sleep(1e-3)
            copy(step, rest, pull, options)

    reader["_copy_here"] = copy_halves
