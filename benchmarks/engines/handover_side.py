# SPDX-License-Identifier: Apache-2.0
"""One engine of a pair that hands requests over, in a separate process: it does what the process
that started it asks, and makes steps meanwhile, as a server's loop does.

    python -m portakv_benchmarks.engines.handover_side PAIR FOLDER
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from random import Random
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv.backends.rows_launch import LoadedKernels
from portakv.errors import PortaKVError
from portakv.migrate import Pull, open_shared, share
from portakv_benchmarks.engines.models import PAIRS
from portakv_benchmarks.migration.cases import memory
from portakv_benchmarks.shared import far
from portakv_benchmarks.shared.shapes import POISON, fill

#: The connectors of an engine, by name; None: the engine is alone.
OURS = "portakv"
NIXL = "nixl"
PREFILL = "kv_producer"
DECODE = "kv_consumer"
#: Seconds in which a request ends, and between two steps of an engine without work.
LIMIT = 100.0
IDLE = 2e-3
#: Seconds after a step in which no request ran.
WAITING = 1e-3
#: The part of a slow pull's time after which something may happen to it.
BEGUN = 0.2


def drawn_prompt(words: int, length: int, seed: int) -> list[int]:
    """Return random tokens, the same in each engine."""
    draw = Random(seed)
    return [draw.randrange(10, words - 10) for _ in range(length)]


class Noted(NamedTuple):
    """A pull, and when its call began."""

    pull: Pull
    began: float


class PullFigures(NamedTuple):
    """A pull that has ended.

    Attributes:
        began: when its call began, by the clock of all processes.
        seconds: from the call until its rows were usable; for pulls at a rate, until the end of the
            step after that.
        seen: seconds from the call until the end of the step in which the engine saw the end.
        nbytes, strategy, error: what it brought, how, and why not.
    """

    began: float
    seconds: float
    seen: float
    nbytes: int
    strategy: str
    error: str | None


class NotedPulls:
    """The pulls of a reader, and a rate for them.

    An engine looks at a pull once a step. A thread waits for each pull, so that its time does not
    depend on the steps.

    Attributes:
        seconds: that a pull takes at least; 0: no limit.
        tokens: of the prompt that is pulled next.
        token_bytes: of a token's rows.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.token_bytes = 0.0
        self._pulls = list[Noted]()
        self._ended = list[PullFigures]()
        self._awaited = SimpleQueue[Pull]()

    def follow(self, reader: Any) -> None:
        """Note each pull that a reader begins from now on."""
        pull = reader.pull
        Thread(target=self._await, daemon=True).start()

        def noted(*args: Any, **terms: Any) -> Pull:
            if self.seconds:
                terms["max_gbps"] = self.tokens * self.token_bytes / self.seconds / 1e9
            began = perf_counter()
            made: Pull = pull(*args, **terms)
            self._pulls.append(Noted(made, began))
            if not self.seconds:
                self._awaited.put(made)
            return made

        reader.pull = noted

    def _await(self) -> None:
        """Wait for each pull, which notices its end at once."""
        while True:
            with suppress(PortaKVError):
                self._awaited.get().synchronize()

    def look(self) -> None:
        """Keep figures alone of pulls that have ended; the pulls hold the owner's memory."""
        now = perf_counter()
        for noted in [each for each in self._pulls if each.pull.ended]:
            self._pulls.remove(noted)
            pull, began = noted
            figures = pull.statistics
            error = type(pull.error).__name__ if pull.error is not None else None
            took = began, pull.age, now - began
            self._ended.append(PullFigures(*took, figures.nbytes, figures.strategy, error))

    def take(self) -> list[PullFigures]:
        """Return the figures of pulls that have ended since the last call."""
        self.look()
        ended = self._ended
        self._ended = []
        return ended

    def under_way(self) -> int:
        """Return the number of pulls that copy, and have done so for some of their time."""
        self.look()
        begun = [each.pull for each in self._pulls if each.pull.statistics.slices]
        return sum(each.age > self.seconds * BEGUN for each in begun)


class RawCopies:
    """Memory of two processes, and copies from one to the other without PortaKV."""

    def __init__(self) -> None:
        self._dense: torch.Tensor | None = None
        self._remote: torch.Tensor | None = None

    def give(self, nbytes: int) -> str:
        """Make memory that is read; return it, as shared."""
        self._dense = fill(memory((nbytes // 8,), torch.int64, _device()), 5)
        _settle()
        return share(self._dense).hex()

    def take(self, shared: str) -> None:
        """Make memory to which copies of shared memory go."""
        self._remote = open_shared(bytes.fromhex(shared), _device())
        self._dense = torch.empty_like(self._remote)

    def copy(self, nbytes: int) -> tuple[float, bool]:
        """Copy so many bytes; return the seconds, and whether they are right."""
        assert self._dense is not None
        assert self._remote is not None
        n = nbytes // 8
        into = self._dense[:n]
        into.fill_(POISON)
        _settle()
        began = perf_counter()
        into.copy_(self._remote[:n], non_blocking=True)
        _settle()
        seconds = perf_counter() - began
        return seconds, torch.equal(into, fill(torch.empty_like(into), 5))


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Seen:
    """What a process makes once: modules, threads, and kernels that its driver loads."""

    def __init__(self) -> None:
        self._modules = set[str]()
        self._threads = set[str]()
        self._kernels = list[str]()
        made: Any = LoadedKernels
        load = made._load

        def noted(kernels: Any, kernel: Any) -> Any:
            self._kernels.append(type(kernel).__name__)
            return load(kernels, kernel)

        made._load = noted

    def note(self) -> None:
        """Take what is here now as known."""
        self._modules = {*sys.modules}
        self._threads = {thread.name for thread in threading.enumerate()}
        self._kernels.clear()

    def news(self) -> dict[str, list[str]]:
        """Return what is new since the last call."""
        modules = sorted({*sys.modules} - self._modules)
        threads = sorted({thread.name for thread in threading.enumerate()} - self._threads)
        made = {"modules": modules, "threads": threads, "kernels": [*self._kernels]}
        self.note()
        return made


class Side:
    """An engine that is driven step by step."""

    def __init__(self, pair: str, folder: Path) -> None:
        self._pair = PAIRS[pair]
        self._folder = folder
        self._llm: Any = None
        self._hands_over = False
        self._handover: Any = None
        self._answers = dict[str, dict[str, Any]]()
        self._pulls = NotedPulls()
        self._raw = RawCopies()
        self._numbers = itertools.count()
        self._guards = dict[str, Any]()
        self._preempted = 0
        self._seen = Seen()

    # --- the engine

    def start(
        self, connector: str | None, role: str, blocks: int, terms: Any, extra: Any
    ) -> dict[str, float]:
        """Start the engine; return the bytes of a token's rows in all ranks.

        Only one rank is in this process. With several ranks, pulls and leases are not known here.

        Args:
            connector: `OURS`, `NIXL`, or None.
            blocks: tokens of a block.
            terms: of vLLM's ``LLM``, besides those of the pair's model.
            extra: the terms of the connector, such as ``hand_over``.
        """
        from portakv_benchmarks.engines.engine import make_llm  # which imports vLLM

        transfer: Any = {"kv_role": role, "kv_load_failure_policy": "recompute"}
        if connector == OURS:
            transfer |= {
                "kv_connector": "PortaKVConnector",
                "kv_connector_module_path": "portakv.integrations.vllm_connector",
                "kv_connector_extra_config": extra,
            }
        elif connector == NIXL:
            transfer |= {"kv_connector": "NixlConnector", **self._nixl_device()}
        else:
            transfer = None
        began = perf_counter()
        llm = make_llm(self._pair.model, self._folder, transfer, block_size=blocks, **terms)
        self._llm = llm
        caches = llm.llm_engine.vllm_config.cache_config
        ranks = llm.collective_rpc(cache_bytes)
        self._hands_over = connector == OURS
        if self._hands_over:
            self._count_preemptions()
        if self._hands_over and len(ranks) == 1:
            self._handover = self._worker_side().store.handover
            if self._handover is not None and self._handover.reader is not None:
                self._pulls.follow(self._handover.reader)
        self._seen.note()
        return {
            "token_bytes": sum(ranks) / caches.num_gpu_blocks / blocks,
            "blocks": caches.num_gpu_blocks,
            "seconds": perf_counter() - began,
        }

    def _nixl_device(self) -> dict[str, str]:
        return {} if torch.cuda.is_available() else {"kv_buffer_device": "cpu"}

    @staticmethod
    def _worker_side() -> Any:
        """Return the worker's side of the connector."""
        transfer = importlib.import_module("vllm.distributed.kv_transfer")
        return transfer.get_kv_transfer_group()

    @property
    def _scheduler(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def _scheduler_side(self) -> Any:
        return self._scheduler.connector.scheduler_side

    def _count_preemptions(self) -> None:
        scheduler_side = self._scheduler_side
        preempted = scheduler_side.preempted

        def counted(request: str) -> None:
            self._preempted += 1
            preempted(request)

        scheduler_side.preempted = counted

    # --- requests

    def add(self, length: int, seed: int, tokens: int, params: dict[str, Any] | None = None) -> str:
        """Add a request, and return its name."""
        from vllm import SamplingParams

        name = f"r{next(self._numbers)}"
        terms = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        ids = drawn_prompt(self._pair.model.config["vocab_size"], length, seed)
        self._pulls.tokens = length
        self._answers[name] = {"began": perf_counter(), "tokens": [], "finished": False}
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, terms)
        return name

    def step(self) -> bool:
        """Make a step; return whether it brought tokens."""
        outputs = self._llm.llm_engine.step()
        now = perf_counter()
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            made = output.outputs[0]
            if made.token_ids:
                answer.setdefault("first", now)
            answer["tokens"] = list(made.token_ids)
            if output.finished:
                answer |= {
                    "finished": True,
                    "ended": now,
                    "cached": output.num_cached_tokens or 0,
                    "params": output.kv_transfer_params,
                    "best": [_best(each) for each in made.logprobs or ()],
                }
        self._pulls.look()
        return bool(outputs)

    def idle(self) -> float:
        """Make a step if there may be work; return the seconds until the next one."""
        if self._llm is None:
            return 1.0
        if self.step():
            return 0.0
        return IDLE

    def until(self, happened: Callable[[], Any], what: str) -> None:
        """Make steps until something has happened."""
        until = time.monotonic() + LIMIT
        while not happened():
            if time.monotonic() > until:
                raise RuntimeError(f"Expected {what} in {LIMIT} s, got {self.counts()}.")
            self.step()
            if not self._scheduler.running:
                time.sleep(WAITING)  # as vLLM's own loop does, for threads that bring rows

    def finish(self, name: str) -> dict[str, Any]:
        """Return the answer to a request, and times in seconds of the clock of all processes."""
        answer = self._answers[name]
        self.until(lambda: answer["finished"], f"an answer to {name}")
        return self._answers.pop(name)

    def finished(self, name: str) -> bool:
        """Return whether a request has its answer."""
        return bool(self._answers[name]["finished"])

    def ask(
        self, length: int, seed: int, tokens: int, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Serve one request."""
        return self.finish(self.add(length, seed, tokens, params))

    def abort(self, name: str) -> None:
        """Abort a request."""
        self._llm.llm_engine.abort_request([name])
        self._answers.pop(name)

    def forget(self) -> None:
        """Clear the engine's own prefix cache, once no block is held."""
        for number in itertools.count():
            if self._llm.reset_prefix_cache():
                return
            if number > 1000:
                raise RuntimeError(f"Expected blocks to be freed, got {self.counts()}.")
            self.ask(20, 10**6 + number, 2)

    def settle(self) -> None:
        """Serve short prompts until all loads and saves have ended: a save ends after the engine
        has its blocks back, and an engine without requests makes no step."""
        for number in itertools.count(1):
            self.ask(20, 2 * 10**6 + number, 2)
            if not self._scheduler_side.statistics()["jobs"]:
                return
            if number > 1000:
                raise RuntimeError(f"Expected saves to end, got {self.counts()}.")

    def news(self) -> dict[str, list[str]]:
        """Return what this process has made for the first time since the last call, or since the
        start of the engine; see `Seen`."""
        return self._seen.news()

    # --- the hand-over

    def pulls(self) -> list[PullFigures]:
        """Return the figures of pulls that have ended since the last call."""
        return self._pulls.take()

    def pulling(self) -> int:
        """Return the number of pulls that copy, and have done so for some of their time."""
        return self._pulls.under_way()

    def slow(self, seconds: float, token_bytes: float) -> None:
        """Let the pull of a prompt that is added last take so long; 0: pulls have no limit."""
        self._pulls.seconds = seconds
        self._pulls.token_bytes = token_bytes

    def preemptions(self) -> int:
        """Return how often requests were preempted."""
        return self._preempted

    def renewals(self, on: bool) -> None:
        """Renew leases when readers ask for it; without it, each lease ends."""
        offers: Any = importlib.import_module("portakv.migrate.owner")
        if not on:
            self._guards.setdefault("renew", offers.Lease.renew)
            offers.Lease.renew = lambda *_: None
        elif "renew" in self._guards:
            offers.Lease.renew = self._guards.pop("renew")

    def counts(self) -> dict[str, Any]:
        """Return what the scheduler side has counted."""
        return self._scheduler_side.statistics() if self._hands_over else {}

    def lease(self, seconds: float) -> None:
        """Offer rows for so many seconds from now on."""
        self._scheduler_side.open_offers([self._handover.endpoint], seconds)

    def revoke(self) -> None:
        """End all offers."""
        self._llm.reset_prefix_cache(reset_connector=True)
        for _ in range(3):
            self.step()

    def guard(self, on: bool) -> None:
        """Look after a pull whether its offers held; without it, any pull that ends is believed."""
        pull: Any = importlib.import_module("portakv.migrate.pull")
        if not on:
            self._guards.setdefault("ended_offer", pull.Pull.ended_offer)
            pull.Pull.ended_offer = lambda _: None
        elif "ended_offer" in self._guards:
            pull.Pull.ended_offer = self._guards.pop("ended_offer")

    def give_raw(self, nbytes: int) -> str:
        """Make memory for raw copies; return it, as shared."""
        return self._raw.give(nbytes)

    def take_raw(self, shared: str) -> None:
        """Make memory to which raw copies go."""
        self._raw.take(shared)

    def copy_raw(self, nbytes: int) -> tuple[float, bool]:
        """Copy so many bytes without PortaKV; return the seconds, and whether they are right."""
        return self._raw.copy(nbytes)

    def collect(self) -> None:
        """Collect garbage, so that it is not collected during a measurement."""
        gc.collect()
        gc.freeze()


def cache_bytes(worker: Any) -> int:
    """Return the bytes of a worker's caches; vLLM calls it in each worker."""
    caches = worker.model_runner.kv_caches
    return sum(each.numel() * each.element_size() for each in caches if hasattr(each, "numel"))


def _best(chances: Any) -> list[Any]:
    """Return the two best tokens and their logarithms of probabilities, the best first."""
    ranked = sorted(chances.items(), key=lambda pair: -pair[1].logprob)
    return [[token, chance.logprob] for token, chance in ranked[:2]]


def main() -> None:
    """Serve until the pipe ends."""
    out = far.answers()
    side = Side(sys.argv[1], Path(sys.argv[2]))
    far.serve(side, out, partial(side.idle))
    os._exit(0)  # an engine in this process ends slowly


if __name__ == "__main__":
    main()
