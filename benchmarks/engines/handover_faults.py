# SPDX-License-Identifier: Apache-2.0
"""Faults of hand-overs between real engines, in an order drawn with a seed: each answer must be
that of a single engine, whatever happens to the rows meanwhile."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from portakv_benchmarks.engines.handover import TO_PREFILL, Engines
from portakv_benchmarks.engines.handover_side import DECODE, PREFILL, PullFigures
from portakv_benchmarks.engines.judging import Answers, Verdict
from portakv_benchmarks.shared.far import Far
from portakv_benchmarks.shared.harness import Row, Rows

#: How many answers of each kind of fault, and on a CPU.
KINDS = {
    "none": (8, 2),
    "lease over before the pull": (12, 1),
    "lease over in mid-pull": (12, 1),
    "offers revoked in mid-pull": (20, 2),
    "decode engine paused in mid-pull": (16, 1),
    "request aborted in mid-pull": (16, 1),
    "prefill engine preempts": (20, 5),
    "prefill engine killed in mid-pull": (4, 1),
}
PREEMPTED = 5  # prompts that are computed together
SEED = 36
ANSWER = 12  # tokens
#: Tokens that hold the blocks of a prefill engine, and of a decode engine.
PREFILL_POOL = 2560
DECODE_POOL = 2304
#: Seconds of a short lease, of a pull that something happens in, and for anything to happen.
LEASE = 0.8
SLOW = 1.5
LIMIT = 60.0
#: Seconds after which no further fault begins.
SECONDS = 230.0
#: What logarithms of probabilities may differ by, in float32: its products may have ten bits.
TOLERANCE = 0.03


class Faults:
    """Two engines that are put through faults, and a single one that judges.

    Args:
        pair: the name of a pair.
        folder: for the model's configuration and the logs.
        note: takes a line of progress.
        few: faults of a CPU.
    """

    def __init__(self, pair: str, folder: Path, note: Callable[..., None], few: bool) -> None:
        self._engines = Engines(pair, folder, note)
        self._note = note
        self._few = few
        self._seeds = count(10**5)
        self._answers = Answers(self._engines.sides, ANSWER, TOLERANCE)
        self._draw = Random(SEED)
        self._prefills = list[str]()
        self._counts = dict[str, Counter[str]]()

    def start(self) -> Rows:
        """Start the engines: a prefill engine for each that is killed, and the others."""
        small, large = self._engines.pair.blocks
        killed = KINDS["prefill engine killed in mid-pull"][self._few]
        for number in range(killed + 1):
            name = f"prefill {number}"
            self._prefills.append(name)
            pool = PREFILL_POOL // small
            self._engines.begin(name, PREFILL, 0, small, num_gpu_blocks_override=pool)
        pool = DECODE_POOL // large
        self._engines.begin("decode", DECODE, 1, large, num_gpu_blocks_override=pool)
        self._engines.begin("single", PREFILL, -2, small, None)
        staging = {"expose": "staging"}
        self._engines.begin("staging", PREFILL, 0, small, hand_over=staging)
        self._engines.join()
        return []

    @property
    def _prefill(self) -> Far:
        return self._engines[self._prefills[0]]

    @property
    def _decode(self) -> Far:
        return self._engines["decode"]

    def run(self) -> Rows:
        """Go through all faults; return a row for each kind."""
        kinds = list[str]()
        for kind, numbers in KINDS.items():
            answers = PREEMPTED if kind == "prefill engine preempts" else 1
            kinds += [kind] * (numbers[self._few] // answers)
        self._draw.shuffle(kinds)
        began = time.monotonic()
        try:
            for done, kind in enumerate(kinds):
                if time.monotonic() > began + SECONDS:
                    self._note(f"no time was left for {len(kinds) - done} faults")
                    break
                self._one(kind)
        finally:
            self._note("faults", **{kind: dict(each) for kind, each in self._counts.items()})
        return [row_of(kind, each) for kind, each in self._counts.items()]

    def _one(self, kind: str) -> None:
        """Go through one fault."""
        calls: dict[str, Callable[[], None]] = {
            "none": self._nothing,
            "lease over before the pull": self._lease_over_before,
            "lease over in mid-pull": self._lease_over,
            "offers revoked in mid-pull": self._revoked,
            "decode engine paused in mid-pull": self._paused,
            "request aborted in mid-pull": self._aborted,
            "prefill engine preempts": self._preempts,
            "prefill engine killed in mid-pull": self._killed,
        }
        self._kind = kind
        began = time.monotonic()
        calls[kind]()
        seconds = round(time.monotonic() - began, 2)
        self._note(kind, seconds=seconds, **self._counts[kind])

    # --- faults

    def _nothing(self) -> None:
        length, seed, params = self._offered()
        self._judge(self._decode.do("ask", length, seed, ANSWER, params), length, seed)

    def _lease_over_before(self) -> None:
        with self._short_lease():
            length, seed, params = self._offered()
            self._await_expiry()
        self._spoil()
        self._judge(self._decode.do("ask", length, seed, ANSWER, params), length, seed)

    def _lease_over(self) -> None:
        self._prefill.do("renewals", False)
        with self._short_lease(), self._slow_pulls():
            length, seed, params = self._offered()
            name = self._pulling(length, seed, params)
            self._await_expiry()
            self._spoil()
            answer = self._decode.do("finish", name)
        self._prefill.do("renewals", True)
        self._judge(answer, length, seed)

    def _revoked(self) -> None:
        with self._slow_pulls():
            length, seed, params = self._offered()
            name = self._pulling(length, seed, params)
            self._prefill.do("revoke")
            self._spoil()
            answer = self._decode.do("finish", name)
        self._judge(answer, length, seed)

    def _paused(self) -> None:
        """A reader that is too slow to renew its lease."""
        with self._short_lease(), self._slow_pulls():
            length, seed, params = self._offered()
            name = self._pulling(length, seed, params)
            self._decode.process.send_signal(signal.SIGSTOP)
            try:
                self._await_expiry()
                self._spoil()
            finally:
                self._decode.process.send_signal(signal.SIGCONT)
            answer = self._decode.do("finish", name)
        self._judge(answer, length, seed)

    def _aborted(self) -> None:
        """Another request needs the blocks into which rows are pulled."""
        with self._slow_pulls():
            length, seed, params = self._offered()
            name = self._pulling(length, seed, params)
            self._decode.do("abort", name)
            length = 61 * 32 + 1
            seed = next(self._seeds)
            answer = self._decode.do("ask", length, seed, ANSWER)
        self._await(lambda: self._decode.do("pulls"), "the end of a pull")
        self._judge(answer, length, seed, pulled=False)

    def _preempts(self) -> None:
        """Rows of prompts that do not fit together, some of which are computed twice."""
        before = self._prefill.do("preemptions")
        waiting = dict[str, tuple[int, int]]()
        for _ in range(PREEMPTED):
            length = 18 * 32 + 1
            seed = next(self._seeds)
            waiting[self._prefill.do("add", length, seed, 60, TO_PREFILL)] = length, seed
        judged = list[tuple[Any, int, int, bool]]()
        while waiting:
            ended = [name for name in waiting if self._prefill.do("finished", name)]
            for name in ended:
                length, seed = waiting.pop(name)
                params = self._prefill.do("finish", name)["params"]
                answer = self._decode.do("ask", length, seed, ANSWER, params)
                judged.append((answer, length, seed, self._has_pulled()))
        for answer, length, seed, pulled in judged:
            self._judge(answer, length, seed, pulled)
        preempted = self._prefill.do("preemptions") - before
        self._counts[self._kind]["preemptions"] += preempted

    def _killed(self) -> None:
        with self._slow_pulls():
            length, seed, params = self._offered()
            name = self._pulling(length, seed, params)
            dead = self._prefills.pop(0)
            self._engines.sides.pop(dead).close()
            answer = self._decode.do("finish", name)
        self._judge(answer, length, seed)

    # --- parts of them

    def _offered(self) -> tuple[int, int, Any]:
        """Let the prefill engine compute a new prompt; return length, seed and what is carried."""
        length = 32 * self._draw.randrange(27, 32) + 1
        seed = next(self._seeds)
        answer = self._prefill.do("ask", length, seed, 1, TO_PREFILL)
        return length, seed, answer["params"]

    def _pulling(self, length: int, seed: int, params: Any) -> str:
        """Add a request to the decode engine; return its name once its pull has begun."""
        name: str = self._decode.do("add", length, seed, ANSWER, params)
        self._await(lambda: self._decode.do("pulling"), "a pull")
        return name

    def _spoil(self) -> None:
        """Compute other prompts in all blocks of the prefill engine that are free."""
        for _ in range(3):
            self._prefill.do("ask", 31 * 32 + 1, next(self._seeds), 1)

    @contextmanager
    def _short_lease(self) -> Iterator[None]:
        before = self._prefill.do("counts").get("offers_expired", 0)
        self._expired = before
        self._prefill.do("lease", LEASE)
        try:
            yield
        finally:
            self._prefill.do("lease", 300.0)

    @contextmanager
    def _slow_pulls(self) -> Iterator[None]:
        self._decode.do("slow", SLOW, self._engines.token_bytes)
        try:
            yield
        finally:
            self._decode.do("slow", 0.0, self._engines.token_bytes)

    def _await_expiry(self) -> None:
        self._await(
            lambda: self._prefill.do("counts").get("offers_expired", 0) > self._expired,
            "the end of a lease",
        )

    def _await(self, happened: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + LIMIT
        while not happened():
            if time.monotonic() > until:
                raise RuntimeError(f"Expected {what} in {LIMIT} s.")
            time.sleep(0.005)

    def _has_pulled(self) -> bool:
        """Return whether the rows of the last request have come."""
        pulls = [*map(PullFigures._make, self._decode.do("pulls"))]
        return bool(pulls) and pulls[-1].error is None

    def _judge(self, answer: Any, length: int, seed: int, pulled: bool | None = None) -> str:
        """Count an answer; return its `Verdict`."""
        if pulled is None:
            pulled = self._has_pulled()
        verdict = self._answers.verdict(answer, length, seed, pulled)
        counts = self._counts.setdefault(self._kind, Counter())
        counts["answers"] += 1
        counts["pulled" if pulled else "computed"] += 1
        counts[verdict] += 1
        return verdict

    # --- beside the faults

    def control(self) -> Rows:
        """Let the decode engine believe each pull that ends; some answers must be wrong."""
        self._kind = "negative control: offers revoked in mid-pull"
        self._decode.do("guard", False)
        try:
            for _ in range(3):
                self._revoked()
        finally:
            self._decode.do("guard", True)
        return [row_of(self._kind, self._counts[self._kind], control=True)]

    def staged(self) -> Rows:
        """Hand prompts over by copies in staging buffers, which the prefill engine sends."""
        self._kind = "rows by staging"
        strategies = set[str]()
        for _ in range(2 if self._few else 8):
            length = 32 * self._draw.randrange(27, 32) + 1
            seed = next(self._seeds)
            params = self._engines["staging"].do("ask", length, seed, 1, TO_PREFILL)["params"]
            answer = self._decode.do("ask", length, seed, ANSWER, params)
            pulls = [*map(PullFigures._make, self._decode.do("pulls"))]
            strategies.add(pulls[-1].strategy)
            self._judge(answer, length, seed, pulls[-1].error is None)
        counts = self._counts[self._kind]
        self._note(self._kind, **counts, strategies=sorted(strategies))
        row = row_of(self._kind, counts)
        row["backend"] = ", ".join(sorted(strategies))
        row["verified"] &= counts["pulled"] == counts["answers"]
        return [row]

    def close(self) -> Rows:
        """End the engines."""
        self._engines.close()
        return []


def row_of(kind: str, counts: Counter[str], control: bool = False) -> Row:
    """Return the row of a kind of fault. A control is right if answers are wrong."""
    wrong = counts[Verdict.WRONG]
    return {
        "kind": "engine_handover_fault",
        "shape": kind,
        "backend": "portakv",
        "op": "guard off" if control else "guarded",
        "answers": counts["answers"],
        "pulled": counts["pulled"],
        "computed": counts["computed"],
        "preemptions": counts["preemptions"],
        "same_bits": counts[Verdict.SAME],
        "near_ties": counts[Verdict.TIE],
        "wrong": wrong,
        "verified": bool(wrong) if control else not wrong,
    }
