# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine whose requests meet a connector alone, or with a witness around it, in turns."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any, NamedTuple

import torch

from portakv.integrations import check_release
from portakv_benchmarks.engines.engine import Answer, Engine
from portakv_benchmarks.engines.models import Model
from portakv_benchmarks.engines.rows import OFF
from portakv_benchmarks.engines.serve import drawn_ids
from portakv_benchmarks.engines.turns import TurnsConnector
from portakv_benchmarks.shared.harness import Row, Rows, short

check_release("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: E402

#: The connector alone, and with a witness.
WITHOUT = "without"
CHECKS = ("sample", "all")
#: A witness that has wrong blocks computed again.
RECOMPUTE = "recompute"
#: Requests that decode together, and the tokens of each. A block has 16 or 32.
TOGETHER = 8
DECODED = 130
#: The hooks of a step to which the witness adds something.
_HOOKS = (
    "build_connector_meta",
    "update_connector_output",
    "bind_connector_metadata",
    "clear_connector_metadata",
    "get_finished",
    "handle_preemptions",
)
#: The hooks that report the ends of loads.
_ENDS = ("get_finished",)


class Took(NamedTuple):
    """What a request or a step took, in milliseconds.

    Attributes:
        wall: until the first token, or of a step.
        processor: of all threads of this process. It says more on a machine that others use too.
    """

    wall: float
    processor: float


def wrapped_terms(model: Model, on_gpu: bool) -> dict[str, Any]:
    """Return vLLM's terms of the connector that is wrapped.

    On a GPU it is vLLM's own offloading, which has no worker for a CPU.
    """
    if on_gpu:
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": model.host},
        }
    return {
        "kv_connector": "PortaKVConnector",
        "kv_connector_module_path": "portakv.integrations.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": model.host, "staging": model.host // 4},
    }


def witness_terms(inner: Mapping[str, Any], check: str, action: str = "log") -> dict[str, Any]:
    """Return vLLM's terms of a witness around a connector."""
    extra = {
        "connector": inner["kv_connector"],
        "connector_module_path": inner.get("kv_connector_module_path"),
        "connector_extra_config": inner["kv_connector_extra_config"],
        "check": check,
        "action": action,
    }
    return {
        "kv_connector": "PortaKVWitness",
        "kv_connector_module_path": "portakv.integrations.vllm.witness",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def measure_engine(model: Model, folder: Path, rounds: int) -> Rows:
    """Return the rows of one engine. The process should end after it."""
    inner = wrapped_terms(model, torch.cuda.is_available())
    connectors = {WITHOUT: inner}
    connectors |= {check: witness_terms(inner, check) for check in CHECKS}
    connectors[RECOMPUTE] = witness_terms(inner, "all", RECOMPUTE)
    of = Turns(Engine(model, connectors, folder), model)
    rows = of.prompts(rounds)
    print("prompts end", flush=True)
    rows += of.steps(rounds)
    print("steps end", flush=True)
    rows += of.repairs(rounds)
    wrapped = inner["kv_connector"]
    return [{"wrapped": wrapped, "shape": model.shape, **row} for row in rows]


class Turns:
    """An engine whose connectors have their turns."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self._engine = engine
        self._model = model
        self._lot = random.Random(1)
        self._drawn = torch.Generator(device="cpu").manual_seed(1)
        self._workers: Mapping[str, Any] = get_kv_transfer_group().children

    def prompts(self, rounds: int) -> Rows:
        """Return a row for new prompts and for known ones, of each length and check."""
        rows: Rows = []
        for length in self._model.prompts:
            took: defaultdict[tuple[str, str], list[Took]] = defaultdict(list)
            for round_ in range(rounds + 1):
                for name in self._in_turn([WITHOUT, *CHECKS]):
                    ids = drawn_ids(self._model, length, self._drawn)
                    cold, new = self._ask(ids)
                    self._engine.forget()
                    hit, known = self._ask(ids)
                    self._engine.forget()
                    assert hit.cached, "nothing is loaded"
                    assert [x for x, _ in hit.tokens] == [x for x, _ in cold.tokens], name
                    if round_:  # the first one warms up
                        took["a new prompt, first token", name].append(new)
                        took["a known prompt, first token", name].append(known)
            rows += _ratios(took, {"tokens": length})
        self._check_counts()
        return rows

    def steps(self, rounds: int) -> Rows:
        """Return a row for a step of requests that decode, and one for the host's part of it."""
        took: defaultdict[tuple[str, str], list[Took]] = defaultdict(list)
        host: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for round_ in range(rounds + 1):
            for name in self._in_turn([WITHOUT, *CHECKS]):
                for _ in range(TOGETHER):
                    self._engine.add(drawn_ids(self._model, 100, self._drawn), DECODED)
                for _ in range(8):  # all are computed, and decode
                    self._engine.step()
                steps = DECODED - 16
                began = perf_counter(), process_time()
                with self._timed(name) as spent:
                    for _ in range(steps):
                        self._engine.step()
                wall = 1e3 * (perf_counter() - began[0]) / steps
                processor = 1e3 * (process_time() - began[1]) / steps
                while self._engine.busy:
                    self._engine.step()
                self._engine.forget()
                if round_:
                    took["a step of eight requests", name].append(Took(wall, processor))
                    for part, seconds in spent.items():
                        host[part, name].append(1e6 * seconds / steps)
        rows = _ratios(took, {"requests": TOGETHER})
        for (part, name), times in host.items():
            row = {"kind": "witness_host", "op": part, "check": name, "us": short(median(times))}
            rows.append({**row, "requests": TOGETHER})
        return rows

    def repairs(self, rounds: int) -> Rows:
        """Return a row for a known prompt of which each loaded block is wrong and computed again,
        compared with a new prompt and with a right load."""
        rows: Rows = []
        for length in self._model.prompts:
            took: defaultdict[str, list[Took]] = defaultdict(list)
            for round_ in range(rounds + 1):
                TurnsConnector.turn = RECOMPUTE
                ids = drawn_ids(self._model, length, self._drawn)
                cold, new = self._ask(ids)
                self._engine.forget()
                _, known = self._ask(ids)
                self._engine.forget()
                before = self._faults()
                with self._damaged():
                    wrong, repaired = self._ask(ids)
                self._engine.forget()
                assert self._faults() > before, "no fault was found"
                assert [x for x, _ in wrong.tokens] == [x for x, _ in cold.tokens]
                if round_:
                    took["new"].append(new)
                    took["right"].append(known)
                    took["wrong"].append(repaired)
            pairs = [*zip(took["wrong"], took["new"], strict=True)]
            processor = median(a.processor / b.processor for a, b in pairs)
            rows.append(
                {
                    "kind": "witness_engine",
                    "op": "all blocks wrong, computed again, first token",
                    "check": RECOMPUTE,
                    "tokens": length,
                    "p50_ms": short(median(x.wall for x in took["wrong"])),
                    "right_p50_ms": short(median(x.wall for x in took["right"])),
                    "of_new": short(median(a.wall / b.wall for a, b in pairs)),
                    "processor_of_new": short(processor),
                    "rounds": rounds,
                }
            )
        TurnsConnector.turn = OFF
        return rows

    def _ask(self, ids: Sequence[int]) -> tuple[Answer, Took]:
        """Serve a request, and return what it took."""
        began = process_time()
        answer = self._engine.ask(ids, tokens=4)
        return answer, Took(answer.first, 1e3 * (process_time() - began))

    def _in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """Yield names in an order that is drawn by lot, each in its turn."""
        listed = [*names]
        self._lot.shuffle(listed)
        for name in listed:
            TurnsConnector.turn = name
            yield name
        TurnsConnector.turn = OFF

    def _check_counts(self) -> None:
        """Raise unless each witness has compared loads, and found no fault."""
        for check in CHECKS:
            self._workers[check].witness.settle(wait=True)
            counts = self._workers[check].statistics()
            assert counts["witness_compared"], check
            assert not [x for x in counts if x.startswith("witness_faults")], counts

    def _faults(self) -> float:
        """Return how many faults the witness has found that has blocks computed again."""
        counts = self._workers[RECOMPUTE].statistics()
        faults = (many for name, many in counts.items() if name.startswith("witness_faults"))
        return float(sum(faults))

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        """Flip a byte in each block of the engine when a load ends, before it is compared."""
        wrapped = self._workers[RECOMPUTE].wrapped
        hooks = {name: getattr(wrapped, name) for name in _ENDS if hasattr(wrapped, name)}
        caches = self._caches()
        left = [1]

        def damage(results: Any) -> Any:
            received = getattr(results, "finished_recving", None)
            received = results[1] if isinstance(results, tuple) else received
            if received and left:
                left.clear()
                for cache in caches:
                    cache.view(torch.uint8)[..., 0] ^= 0x40
            return results

        for name, hook in hooks.items():
            setattr(wrapped, name, _after(hook, damage))
        try:
            yield
        finally:
            for name in hooks:
                delattr(wrapped, name)

    def _caches(self) -> list[torch.Tensor]:
        """Return the engine's caches."""
        llm = vars(self._engine)["_llm"]
        (caches,) = llm.collective_rpc(_caches_of)
        made: list[torch.Tensor] = caches
        return made

    @contextmanager
    def _timed(self, name: str) -> Iterator[dict[str, float]]:
        """Yield the host's seconds in a witness's hooks, without those of the wrapped connector."""
        spent = defaultdict[str, float](float)
        if name == WITHOUT:
            yield spent
            return
        undo = list[tuple[Any, str]]()
        sides = {
            "the scheduler": self._engine.connector.children[name],
            "the worker": self._workers[name],
        }
        for part, side in sides.items():
            for sign, each in ((1, side), (-1, side.wrapped)):
                for hook in _HOOKS:
                    if hook in vars(type(each)) or hook in dir(type(each)):
                        setattr(each, hook, _timing(getattr(each, hook), spent, part, sign))
                        undo.append((each, hook))
        try:
            yield spent
        finally:
            for each, hook in undo:
                each.__dict__.pop(hook, None)


def _caches_of(worker: Any) -> list[torch.Tensor]:
    """Return the caches of a worker."""
    caches: list[torch.Tensor] = worker.model_runner.kv_caches
    return caches


def _after(hook: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **terms: change(hook(*args, **terms))


def _timing(
    hook: Callable[..., Any], spent: dict[str, float], part: str, sign: int
) -> Callable[..., Any]:
    """Return a hook whose time is added to a part, or subtracted with that of this measurement."""
    within = _seconds_of_timing() if sign < 0 else 0.0

    def call(*args: Any, **terms: Any) -> Any:
        began = thread_time()
        try:
            return hook(*args, **terms)
        finally:
            spent[part] += sign * (thread_time() - began + within)

    return call


@cache
def _seconds_of_timing() -> float:
    """Return the time that a timed hook adds to the timed hook that calls it, around its own."""
    spent = dict.fromkeys(("outer", "inner"), 0.0)
    inner = _timing(lambda: None, spent, "inner", 1)
    outer = _timing(inner, spent, "outer", 1)
    calls = 10_000
    for _ in range(calls):
        outer()
    return (spent["outer"] - spent["inner"]) / calls


def _ratios(took: Mapping[tuple[str, str], Sequence[Took]], more: Row) -> Rows:
    """Return a row for each operation and connector, with the median ratios of pairs."""
    rows: Rows = []
    for (op, name), times in took.items():
        row: Row = {
            "kind": "witness_engine",
            "op": op,
            "check": name,
            "p50_ms": short(median(x.wall for x in times)),
            "least_ms": short(min(x.wall for x in times)),
            "processor_ms": short(median(x.processor for x in times)),
            "rounds": len(times),
            **more,
        }
        if name != WITHOUT:
            pairs = [*zip(times, took[op, WITHOUT], strict=True)]
            row["of_without"] = short(median(a.wall / b.wall for a, b in pairs))
            processor = median(a.processor / b.processor for a, b in pairs)
            row["processor_of_without"] = short(processor)
        rows.append(row)
    return rows
