# SPDX-License-Identifier: Apache-2.0
"""Random schedules of requests in one real engine: lengths, priorities and aborts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from support.vllm_cpu import Engine, prompt

MOST_LIVE = 12  # requests that wait or run at a time
LONGEST_ANSWER = 24  # tokens
SHARE = 0.2  # of requests that are aborted, at most


@dataclass(frozen=True)
class Asked:
    """A request: the number of its prompt, and the tokens of its answer."""

    number: int
    tokens: int


def prompts_of(draw: random.Random, many: int) -> list[list[int]]:
    """Return prompts of random lengths, of which some begin as others do."""
    prompts = [prompt(draw.randrange(20, 700), 1000)]
    for number in range(1, many):
        begin = draw.choice(prompts)
        kept = draw.choice([0, draw.randrange(len(begin))])
        prompts.append([*begin[:kept], *prompt(draw.randrange(20, 400), 1000 + number)])
    return prompts


class Walk:
    """A walk of an engine through random schedules.

    Attributes:
        wrong: requests with other tokens than the expected ones.
        counts: of requests by how they ended.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[list[int]],
        expected: Sequence[list[int]],
        draw: random.Random,
    ) -> None:
        self.wrong = list[Asked]()
        self.counts = Counter[str]()
        self._engine = engine
        self._inner: Any = engine.llm.llm_engine
        self._prompts = prompts
        self._expected = expected
        self._draw = draw
        self._live = dict[str, Asked]()

    def run(self, requests: int) -> None:
        """Serve so many requests, unless one is wrong."""
        begun = 0
        aborted = 0
        while (begun < requests or self._live) and not self.wrong:
            if begun < requests and len(self._live) < MOST_LIVE and self._draw.random() < 0.9:
                self._begin(f"request-{begun}")
                begun += 1
            # Not a share of the steps: an engine that waits for rows has many.
            if self._live and aborted < SHARE * begun and self._draw.random() < 0.06:
                self._abort(self._draw.choice([*self._live]))
                aborted += 1
            for output in self._inner.step():
                if output.finished:
                    self._end(output)

    def _begin(self, name: str) -> None:
        from vllm import SamplingParams

        number = self._draw.randrange(len(self._prompts))
        asked = Asked(number, self._draw.randrange(1, LONGEST_ANSWER))
        terms = SamplingParams(
            temperature=0.0, max_tokens=asked.tokens, ignore_eos=True, detokenize=False
        )
        priority = self._draw.randrange(4)
        tokens = {"prompt_token_ids": self._prompts[number]}
        self._inner.add_request(name, tokens, terms, priority=priority)
        self._live[name] = asked

    def _abort(self, name: str) -> None:
        """Abort a request, and count in which state it was."""
        requests = self._engine.scheduler.requests
        (state,) = [x.status.name for key, x in requests.items() if key.startswith(name)] or ["?"]
        self.counts[f"aborted {state}"] += 1
        self._inner.abort_request([name])
        del self._live[name]

    def _end(self, output: Any) -> None:
        """Compare the tokens of a request that has ended."""
        asked = self._live.pop(output.request_id, None)
        if asked is None:
            return
        self.counts["finished"] += 1
        if list(output.outputs[0].token_ids) != self._expected[asked.number][: asked.tokens]:
            self.wrong.append(asked)


def count_preemptions(scheduler_side: Any) -> list[str]:
    """Return a list that gets the name of each request whose blocks are taken."""
    names = list[str]()
    preempted = scheduler_side.preempted

    def note_name(name: str) -> None:
        names.append(name)
        preempted(name)

    scheduler_side.preempted = note_name
    return names
