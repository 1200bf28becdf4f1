# SPDX-License-Identifier: Apache-2.0
"""Judge answers by those of a single engine.

Kernels of other shapes round differently, so an answer may differ from the expected one where two
tokens are nearly as likely. Such an answer counts separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portakv_benchmarks.shared.far import Far


class Verdict:
    """How an answer compares with the expected one."""

    SAME = "same bits"
    EQUAL = "equal tokens"
    TIE = "equal until two tokens are nearly as likely"
    WRONG = "wrong"


def compare(answer: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> str:
    """Return a `Verdict`.

    Args:
        answer: with ``tokens``, and in ``best`` for each of them the two most likely ones, with the
            logarithms of their probabilities.
        expected: the same of a single engine.
        tolerance: the most by which these logarithms may differ.
    """
    tokens: Sequence[int] = answer["tokens"]
    if tokens == expected["tokens"] and answer["best"] == expected["best"]:
        return Verdict.SAME
    if len(tokens) != len(expected["tokens"]):
        return Verdict.WRONG
    each = zip(tokens, expected["tokens"], answer["best"], expected["best"], strict=True)
    for token, wanted, got, best in each:
        if token != wanted:
            near = best[0][1] - best[1][1] < tolerance and token == best[1][0]
            return Verdict.TIE if near else Verdict.WRONG
        if abs(got[0][1] - best[0][1]) >= tolerance:
            return Verdict.WRONG
    return Verdict.EQUAL


class Answers:
    """The answers of a single engine.

    Args:
        sides: the engines, of which ``single`` is one.
        tokens: of an answer.
        tolerance: as of `compare`.
    """

    def __init__(self, sides: Mapping[str, Far], tokens: int, tolerance: float) -> None:
        self._sides = sides
        self._tokens = tokens
        self._tolerance = tolerance

    def verdict(self, answer: Mapping[str, Any], length: int, seed: int, pulled: bool) -> str:
        """Return a `Verdict` about an answer.

        Args:
            pulled: the engine has computed only the last token of the prompt. It is compared with a
                hit in the single engine's own cache, since the same kernels compute that.
        """
        single = self._sides["single"]
        expected = single.do("ask", length, seed, self._tokens)
        if pulled:
            expected = single.do("ask", length, seed, self._tokens)
            if expected["cached"] != length - 1:
                raise RuntimeError(f"Expected a hit of {length - 1}, got {expected['cached']}.")
        return compare(answer, expected, self._tolerance)
