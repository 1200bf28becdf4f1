# SPDX-License-Identifier: Apache-2.0
"""Hand requests over from an engine of two ranks to an engine of one, whose device has a rank of
the other engine too: each answer must be that of a single engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from portakv_benchmarks.engines.checkpoint import WEIGHTS, write_checkpoint
from portakv_benchmarks.engines.handover import TO_PREFILL, Engines, check_weights
from portakv_benchmarks.engines.handover_faults import ANSWER, TOLERANCE, row_of
from portakv_benchmarks.engines.handover_side import DECODE, PREFILL, PullFigures
from portakv_benchmarks.engines.judging import Answers
from portakv_benchmarks.shared.harness import Rows

#: Tokens of the prompts, one after whole blocks of either engine, and on a CPU.
LENGTHS = (65, 833, 897, 961, 1025, 1985)
FEW = (65, 961)
RANKS = 2
SWAPPED = "portakv_benchmarks.engines.swapped_heads.SwappedHeads"


class Ranks:
    """An engine of two ranks, one of a single rank that goes on, and one that judges.

    Args:
        engines: of a pair; none has begun.
        note: takes a line of progress.
        few: prompts of a CPU, whose memory does not hold all engines together.
    """

    def __init__(self, engines: Engines, note: Callable[..., None], few: bool) -> None:
        self._engines = engines
        self._note = note
        self._few = few
        self._lengths = FEW if few else LENGTHS
        self._seeds = count(2 * 10**5)
        self._answers = Answers(self._engines.sides, ANSWER, TOLERANCE)

    def start(self) -> Rows:
        """Write the weights, and start the engines."""
        small, large = self._engines.pair.blocks
        write_checkpoint(self._engines.pair.model.config, self._engines.folder)
        self._engines.begin("decode", DECODE, 1, large)
        self._engines.begin("single", PREFILL, 0, small, None)
        self._engines.begin("prefill", PREFILL, 0, small, tensor_parallel_size=RANKS)
        if not self._few:
            self._begin_swapped()
        self._engines.join()
        check_weights(self._engines["single"])
        return []

    def run(self) -> Rows:
        """Hand prompts over; return a row."""
        small, large = self._engines.pair.blocks
        counts = self._handed_over("prefill")
        row = row_of(f"TP {RANKS} -> 1, blocks {small} -> {large}", counts)
        row["verified"] &= counts["pulled"] == counts["answers"]
        return [row]

    def control(self) -> Rows:
        """Do the same with ranks that offer their heads as those of each other; the answers must
        be wrong."""
        if self._few:
            self._engines.sides.pop("prefill").close()
            self._begin_swapped()
            self._engines.join()
        counts = self._handed_over("swapped")
        return [row_of("negative control: heads of the other rank", counts, control=True)]

    def _begin_swapped(self) -> None:
        """Begin to start an engine whose ranks offer their heads as those of each other."""
        terms: dict[str, Any] = {"tensor_parallel_size": RANKS, "worker_extension_cls": SWAPPED}
        small = self._engines.pair.blocks[0]
        self._engines.begin("swapped", PREFILL, 0, small, **terms)

    def _handed_over(self, prefill: str) -> Counter[str]:
        """Hand a prompt of each length over; return how many answers there were of each kind."""
        counts = Counter[str]()
        for length in self._lengths:
            seed = next(self._seeds)
            computed = self._engines[prefill].do("ask", length, seed, 1, TO_PREFILL)
            answer = self._engines["decode"].do("ask", length, seed, ANSWER, computed["params"])
            pulls = [*map(PullFigures._make, self._engines["decode"].do("pulls"))]
            pulled = bool(pulls) and pulls[-1].error is None
            counts["answers"] += 1
            counts["pulled" if pulled else "computed"] += 1
            counts[self._answers.verdict(answer, length, seed, pulled)] += 1
            strategies = [each.strategy for each in pulls]
            self._note(f"{prefill}: {length} tokens", strategies=strategies, **counts)
        return counts

    def close(self) -> Rows:
        """End the engines, and remove the weights."""
        self._engines.close()
        (self._engines.folder / WEIGHTS).unlink(missing_ok=True)
        return []
