# SPDX-License-Identifier: Apache-2.0
"""Serve prompts in one engine with each connector in turn, and print what requests waited for.

A prompt is computed, found in the engine's own prefix cache, and found by the connector after that
cache was emptied; without a connector it is computed again. The tokens of both hits, and their
logarithms of probabilities, must be equal: the same kernels computed them. ``python -m
portakv_benchmarks.engines.serve MODEL FOLDER`` prints the rows of one model as JSON. ``FOLDER`` is
on the disk that is measured.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from portakv_benchmarks.engines.engine import Engine
from portakv_benchmarks.engines.models import MODELS, Model
from portakv_benchmarks.engines.rows import (
    DECODING,
    DISK,
    HOST,
    INCOMING,
    OFF,
    OWN,
    PACKED,
    Served,
    rows_of_prompts,
    rows_of_steps,
)
from portakv_benchmarks.engines.turns import TurnsConnector
from portakv_benchmarks.shared.harness import Rows

#: Tokens of a request that decodes, and steps between two prompts that come in.
DECODED = 180
_APART = 24


def connectors_of(model: Model, folder: Path) -> dict[str, Any]:
    """Return the configuration of each connector of a model's engine."""
    ours = {
        "kv_connector": "PortaKVConnector",
        "kv_connector_module_path": "portakv.integrations.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    staging = model.host // 4
    terms: dict[str, Any] = {"host": model.host, "staging": staging}
    made: dict[str, Any] = {HOST: {**ours, "kv_connector_extra_config": terms}}
    if model.packed:
        made[PACKED] = {**ours, "kv_connector_extra_config": {**terms, "encoding": "pack"}}
    if model.disk:
        terms = {
            "folder": str(folder / "blocks"),
            "capacity": 4 * model.host,
            "host": 0,
            # Saves have half of it; a step of the longest prompt has to fit.
            "staging": 3 * staging,
        }
        made[DISK] = {**ours, "kv_connector_extra_config": terms}
    if model.own and torch.cuda.is_available():
        made[OWN] = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": model.host},
        }
    return made


def serve(engine: Engine, ids: Sequence[int]) -> Served:
    """Serve a new prompt three times, with the connector whose turn it is."""
    cold = engine.ask(ids)
    device_hit = engine.ask(ids)
    engine.forget()
    landed = _landed(engine)
    hit = engine.ask(ids)
    brought = _landed(engine) - landed
    engine.forget()
    if TurnsConnector.turn == OFF:
        return Served(cold.first, device_hit.first, hit.first, hit.cached == 0)
    right = hit.cached == device_hit.cached > 0 and hit.tokens == device_hit.tokens
    if TurnsConnector.turn in (HOST, DISK, PACKED):  # the engine counts what was promised
        right &= brought > 0
    return Served(cold.first, device_hit.first, hit.first, right)


def _landed(engine: Engine) -> int:
    """Return how many stored blocks PortaKV's connector has brought."""
    scheduler_side = getattr(engine.connector.children[TurnsConnector.turn], "scheduler_side", None)
    return 0 if scheduler_side is None else int(scheduler_side.counts["landed_blocks"])


def measure_prompts(engine: Engine, model: Model, names: Sequence[str]) -> Rows:
    """Return a row for each part of a kind of prompt and each connector."""
    drawn = torch.Generator(device="cpu").manual_seed(1)
    served: defaultdict[tuple[str, int], list[Served]] = defaultdict(list)
    first = dict[str, float]()
    for round_, length in product(range(model.rounds + 1), model.prompts):
        if (round_, length) == (1, model.prompts[0]):  # the first round warmed up
            first = {name: served[name, model.prompts[-1]][0].cold for name in names}
            served.clear()
        for name in names if round_ % 2 else reversed(names):
            TurnsConnector.turn = name
            served[name, length].append(serve(engine, drawn_ids(model, length, drawn)))
    TurnsConnector.turn = OFF
    return rows_of_prompts(model, served, first)


def drawn_ids(model: Model, length: int, drawn: torch.Generator) -> list[int]:
    """Return random tokens."""
    most = model.config["vocab_size"] - 10
    ids: list[int] = torch.randint(10, most, (length,), generator=drawn, device="cpu").tolist()
    return ids


def check_weights(engine: Engine, model: Model) -> None:
    """Raise `RuntimeError` if the tokens do not depend on the whole prompt: they would judge
    nothing."""
    ids = drawn_ids(model, 200, torch.Generator(device="cpu").manual_seed(3))
    answers = [engine.ask([first, *ids[1:]]) for first in (ids[0], ids[0] ^ 1)]
    if answers[0].tokens == answers[1].tokens or len({*answers[0].tokens}) < 3:
        raise RuntimeError("Expected tokens that depend on the first one, got equal answers.")
    engine.forget()


def measure_decoding(engine: Engine, model: Model, names: Sequence[str]) -> Rows:
    """Return rows of the time between tokens while prompts come in: none, known or new ones."""
    drawn = torch.Generator(device="cpu").manual_seed(2)
    steps: defaultdict[tuple[str, str], list[list[float]]] = defaultdict(list)
    length = model.prompts[0]
    for round_ in range(model.runs + 1):
        for name in names if round_ % 2 else reversed(names):
            TurnsConnector.turn = name
            known = [drawn_ids(model, length, drawn) for _ in range(INCOMING)]
            for ids in known:
                engine.ask(ids, tokens=1)
            engine.forget()
            new = [drawn_ids(model, length, drawn) for _ in range(INCOMING)]
            for what, incoming in (("nothing", []), ("hits", known), ("cold", new)):
                took = _decode(engine, model, incoming, drawn)
                if round_:
                    steps[name, what].append(took)
                engine.forget()
    TurnsConnector.turn = OFF
    return rows_of_steps(model, steps)


def _decode(
    engine: Engine, model: Model, incoming: Sequence[list[int]], drawn: torch.Generator
) -> list[float]:
    """Return the milliseconds of each step while requests decode, and prompts come in."""
    for _ in range(DECODING):
        engine.add(drawn_ids(model, 100, drawn), DECODED)
    for _ in range(8):  # all are computed, and decode
        engine.step()
    left = list(incoming)
    took = list[float]()
    began = perf_counter()
    while engine.busy:
        if left and len(took) % _APART == 0:
            engine.add(left.pop(), 1)
        engine.step()
        now = perf_counter()
        took.append(1e3 * (now - began))
        began = now
    return took[: DECODED - 16]


def main() -> None:
    """Run the engine of the model that the command names, and print its rows."""
    model = MODELS[sys.argv[1]]
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as place:
        folder = Path(place)
        connectors = connectors_of(model, folder)
        engine = Engine(model, connectors, folder)
        names = [OFF, *connectors]
        check_weights(engine, model)
        rows = measure_prompts(engine, model, names) + measure_decoding(engine, model, names)
        print(json.dumps(rows), flush=True)
    os._exit(0)  # an engine in this process ends slowly


if __name__ == "__main__":
    # The engine imports `turns` by its name; the turn must be the same variable there and here.
    from portakv_benchmarks.engines import serve as this

    this.main()
