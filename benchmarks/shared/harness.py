# SPDX-License-Identifier: Apache-2.0
"""The harness: variants in turns with `copy_` of the same bytes, every byte checked in the run.

In each round every variant is called once, in an order that rotates, with the next memory object.
A variant's ratio is the median over the rounds of the time of `copy_` / its own time, so that what
slows the whole machine down slows both. Its bytes are checked before the rounds, for each memory
object, and once behind them, the output poisoned each time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from portakv.errors import PortaKVError
from portakv_benchmarks.shared.timers import Call, Sample, Timer

#: A row whose p90 is above this many times its median is flagged as noisy.
NOISY = 1.2
_LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of moving the bytes.

    Attributes:
        labels: what identifies it in the results.
        call: the timed call, with a memory object's number.
        poison: overwrites what the call will write.
        right: whether every byte landed, and none elsewhere.
    """

    labels: Mapping[str, Any]
    call: Call
    poison: Callable[[int], None]
    right: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rounds gave for one variant; times in microseconds.

    ``repeats`` are the ratios of the single measurements, where there were several.
    """

    labels: Mapping[str, Any]
    p10: float
    p50: float
    p90: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    host: float
    rounds: int
    hidden: bool
    verified: bool
    repeats: tuple[float, ...] = ()

    @property
    def noisy(self) -> bool:
        """True where the row is flagged: its spread is too wide to be quoted."""
        return self.p90 > NOISY * self.p50


def usable(variants: Sequence[Variant]) -> tuple[list[Variant], list[tuple[Variant, str]]]:
    """The variants that can be called at all, and the others with what they said."""
    good, refused = [], []
    for variant in variants:
        try:
            variant.poison(0)
            variant.call(0)
        except (PortaKVError, RuntimeError, TypeError, ValueError) as error:
            refused.append((variant, in_a_line(error)))
        else:
            good.append(variant)
    return good, refused


def in_a_line(error: BaseException) -> str:
    """An error in a line, with the one that it came up behind, if any."""
    line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    behind = error.__context__
    return line if behind is None else f"{line} (behind {in_a_line(behind)})"


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: that takes the host longer than what is timed."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def measure(
    ceiling: Variant,
    variants: Sequence[Variant],
    timer: Timer,
    *,
    objects: int,
    rounds: int,
    seconds: float,
) -> list[Measured]:
    """Measure variants beside ``ceiling``, `copy_` of the same bytes; its row comes first.

    Args:
        objects: memory objects to take turns with.
        rounds: how many rounds; fewer, but at least 5, where ``seconds`` are over first.
    """
    everyone = [ceiling, *variants]
    verified = [all(_check(variant, i) for i in range(objects)) for variant in everyone]
    settled = [timer.settle(variant.call, objects) for variant in everyone]
    samples: list[list[Sample]] = [[] for _ in everyone]
    began = perf_counter()
    with uncollected():
        for n in range(rounds):
            if n >= _LEAST_ROUNDS and perf_counter() - began > seconds:
                break
            for turn in range(len(everyone)):
                v = (n + turn) % len(everyone)
                i = (n * len(everyone) + turn) % objects  # never that of the call before
                samples[v].append(timer.sample(everyone[v].call, i, settled[v]))
    verified = [known and _check(v, 0) for known, v in zip(verified, everyone, strict=True)]
    return [
        _summary(variant, own, samples[0], known)
        for variant, own, known in zip(everyone, samples, verified, strict=True)
    ]


def figures(one: Measured, moved: int) -> dict[str, Any]:
    """What a row says of times; ``moved`` bytes count in its bandwidth."""
    return {
        "p10_us": short(one.p10),
        "p50_us": short(one.p50),
        "p90_us": short(one.p90),
        "gb_per_s": short(moved / one.p50 / 1e3),
        "ratio": short(one.ratio),
        "ratio_p10": short(one.ratio_p10),
        "ratio_p90": short(one.ratio_p90),
        "host_us": short(one.host),
        "rounds": one.rounds,
        "host_hidden": one.hidden,
        "noisy": one.noisy,
        "verified": one.verified,
    }


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def merge(repeats: Sequence[Sequence[Measured]]) -> list[Measured]:
    """One result for each variant out of several measurements of all: medians of the medians."""
    merged = []
    for same in zip(*repeats, strict=True):
        middle = {
            name: quantile([getattr(one, name) for one in same], 0.5)
            for name in ("p10", "p50", "p90", "ratio", "ratio_p10", "ratio_p90", "host")
        }
        merged.append(
            Measured(
                labels=same[0].labels,
                rounds=sum(one.rounds for one in same),
                hidden=all(one.hidden for one in same),
                verified=all(one.verified for one in same),
                repeats=tuple(one.ratio for one in same),
                **middle,
            )
        )
    return merged


def quantile(values: Sequence[float], q: float) -> float:
    """The q-th quantile, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def _check(variant: Variant, i: int) -> bool:
    variant.poison(i)
    variant.call(i)
    return variant.right(i)


def _summary(
    variant: Variant, own: Sequence[Sample], ceiling: Sequence[Sample], verified: bool
) -> Measured:
    times = [sample.elapsed for sample in own]
    ratios = [c.elapsed / s.elapsed for c, s in zip(ceiling, own, strict=True)]
    return Measured(
        labels=variant.labels,
        p10=quantile(times, 0.1),
        p50=quantile(times, 0.5),
        p90=quantile(times, 0.9),
        ratio=quantile(ratios, 0.5),
        ratio_p10=quantile(ratios, 0.1),
        ratio_p90=quantile(ratios, 0.9),
        host=quantile([sample.host for sample in own], 0.5),
        rounds=len(own),
        hidden=all(sample.hidden for sample in own),
        verified=verified,
    )
