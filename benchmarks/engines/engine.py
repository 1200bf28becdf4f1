# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process, whose steps are timed: random weights, token ids in and out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv_benchmarks.engines.models import Model
from portakv_benchmarks.engines.turns import TurnsConnector
from portakv_benchmarks.engines.weights import FORMAT

#: Environment of every engine: one process, no network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
#: Seconds in which saves may end before the prefix cache is emptied, and between two looks.
SECONDS = 60.0
PAUSE = 0.005


class Answer(NamedTuple):
    """What a request gave.

    Attributes:
        first: milliseconds until its first token.
        cached: tokens of the prompt that were not computed.
        tokens: the generated ones, each with its logarithm of the probability.
    """

    first: float
    cached: int
    tokens: list[tuple[int, float]]


def load_environment(model: Model) -> None:
    """Set the environment of this process's engine."""
    os.environ.update({**ENVIRONMENT, **model.environment})


def make_llm(model: Model, folder: Path, transfer: Any, **terms: Any) -> Any:
    """Return vLLM's engine of a model.

    Args:
        folder: with the model's configuration, which is written unless it is there.
        transfer: the fields of vLLM's ``KVTransferConfig``; None: the engine has no connector.
        terms: of vLLM's ``LLM``, besides those of the model.
    """
    load_environment(model)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    config = folder / "config.json"
    if not config.exists():
        config.write_text(json.dumps(model.config))
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",
        seed=0,
        kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
        **{"load_format": FORMAT, **model.terms, **terms},
    )


class Engine:
    """An engine of a model, with the connectors of `TurnsConnector`.

    Args:
        connectors: the configuration of each by its name.
        folder: for the model's configuration.
    """

    def __init__(self, model: Model, connectors: dict[str, Any], folder: Path) -> None:
        alike = None
        if "sliding_window" in model.config:
            load_environment(model)
            if not TurnsConnector.all_serve_hybrids(connectors):
                alike = True  # windows are kept as if they were whole
        transfer = {
            "kv_connector": "TurnsConnector",
            "kv_connector_module_path": "portakv_benchmarks.engines.turns",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": connectors},
        }
        self._llm = make_llm(model, folder, transfer, disable_hybrid_kv_cache_manager=alike)
        self._number = 0
        self._core = self._llm.llm_engine.engine_core.engine_core

    @property
    def connector(self) -> TurnsConnector:
        """Return the scheduler's side of the connectors."""
        made: TurnsConnector = self._core.scheduler.connector
        return made

    def add(self, ids: Sequence[int], tokens: int) -> str:
        """Add a request, and return its name."""
        from vllm import SamplingParams

        self._number += 1
        name = f"r{self._number}"
        terms = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0
        )
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(ids)}, terms)
        return name

    def step(self) -> list[Any]:
        """Run a step, and return vLLM's outputs of requests."""
        outputs: list[Any] = self._llm.llm_engine.step()
        return outputs

    @property
    def busy(self) -> bool:
        """Return whether a request has not ended."""
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def ask(self, ids: Sequence[int], tokens: int = 8) -> Answer:
        """Serve one request alone."""
        began = perf_counter()
        self.add(ids, tokens)
        first = None
        output = None
        while self.busy:
            for output in self.step():
                if first is None and output.outputs[0].token_ids:
                    first = 1e3 * (perf_counter() - began)
        assert output is not None
        assert first is not None
        made = output.outputs[0]
        pairs = [
            (token, chances[token].logprob)
            for token, chances in zip(made.token_ids, made.logprobs, strict=True)
        ]
        return Answer(first, output.num_cached_tokens or 0, pairs)

    def forget(self) -> None:
        """Let saves end, and empty the engine's own prefix cache.

        A save ends when its blocks are stored, which is after the engine has them back. An engine
        learns of it in a step.
        """
        began = perf_counter()
        number = 0
        while perf_counter() - began < SECONDS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ask([11, 12, 13 + number % 7], tokens=3)
            number += 1
            if number > 2 and not self._saving() and self._llm.reset_prefix_cache():
                return
            time.sleep(PAUSE)
        raise RuntimeError("Expected saves to end, got blocks that are retained.")

    def _saving(self) -> bool:
        """Return whether a load or save of PortaKV's connectors has not ended."""
        scheduler_sides = (
            getattr(each, "scheduler_side", None) for each in self.connector.children.values()
        )
        return any(
            scheduler_side is not None and scheduler_side.statistics()["jobs"]
            for scheduler_side in scheduler_sides
        )
