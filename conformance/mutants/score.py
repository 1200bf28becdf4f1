# SPDX-License-Identifier: Apache-2.0
"""The score of the suite: every mutant has to be caught, under every seed.

``python -m portakv_conformance.mutants.score``, or `portakv conform --mutants`. Exit code 0 where
every mutant is caught and the un-mutated bases pass, else 1: also where one could not be judged.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from portakv.registry.registry import ENVIRONMENT
from portakv_conformance.mutants import CONTROLS, MUTANTS, Mutant
from portakv_conformance.mutants.table import document, print_score
from portakv_conformance.mutants.trial import (
    WALL_LIMIT,
    Trial,
    fails_self_check,
    try_control,
    try_mutant,
)
from portakv_conformance.run.options import whole_number
from portakv_conformance.run.workers import INTERRUPTED

_JOBS = 2


def score(
    mutants: Sequence[Mutant],
    seeds: Sequence[int],
    *,
    jobs: int = _JOBS,
    attempt: Callable[[Mutant, int], Trial] = try_mutant,
    tell: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Try every mutant under every seed, ``jobs`` at a time; in the order of mutants and seeds.

    ``tell`` is given each trial as it ends.
    """
    with _ending_with_the_caller(jobs) as pool:
        asked = {
            pool.submit(attempt, mutant, seed): (number, seed)
            for seed in seeds
            for number, mutant in enumerate(mutants)
        }
        for future in as_completed(asked):
            tell(future.result())
    return [future.result() for future, _ in sorted(asked.items(), key=lambda item: item[1])]


@contextmanager
def _ending_with_the_caller(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for runs of the suite; where the caller is interrupted, no run begins or goes on."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    except BaseException:
        INTERRUPTED.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        INTERRUPTED.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the score; returns the exit code."""
    asked = _parser().parse_args(argv)
    if os.environ.get(ENVIRONMENT):
        _parser().error(f"{ENVIRONMENT} forces another backend than the mutant; unset it")
    mutants = _chosen(asked.only)
    # Two processes on two cores: threads of torch's own would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    controls = {} if asked.no_control else _controls(mutants)
    seeds = range(asked.seed, asked.seed + asked.runs)
    trials = score(
        mutants, seeds, jobs=asked.jobs, tell=_say,
        attempt=lambda mutant, seed: try_mutant(mutant, seed, wall=asked.limit),
    )  # fmt: skip
    known = {mutant.name for mutant in mutants if fails_self_check(mutant)}
    print_score(trials, known, controls)
    if asked.write is not None:
        asked.write.write_text(document(trials, known), encoding="utf-8")
    bad = any(not trial.caught for trial in trials) or any(controls.values())
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portakv conform --mutants",
        description="Runs the suite on backends with seeded bugs, and counts those that it misses.",
    )
    add = parser.add_argument
    count = whole_number(1)
    add("--runs", type=count, default=1, metavar="N", help="with N different seeds (default: 1)")
    add("--seed", type=int, default=0, metavar="S", help="the first of them (default: 0)")
    add("--jobs", type=count, default=_JOBS, metavar="N", help="at a time (default: 2)")
    add("--only", nargs="+", metavar="NAME", help="these mutants")
    add("--limit", type=float, default=WALL_LIMIT, metavar="SECONDS", help="for one mutant")
    add("--no-control", action="store_true", help="do not run the un-mutated bases")
    add("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    return parser


def _chosen(names: Sequence[str] | None) -> tuple[Mutant, ...]:
    if names is None:
        return MUTANTS
    unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
    if unknown:
        _parser().error(f"no mutant is named {unknown[0]!r}; docs/mutants.md lists them")
    return tuple(mutant for mutant in MUTANTS if mutant.name in names)


def _controls(mutants: Sequence[Mutant]) -> dict[str, str | None]:
    devices = {mutant.device for mutant in mutants}
    needed = [control for control in CONTROLS if control.device in devices]
    with _ending_with_the_caller(_JOBS) as pool:
        found = dict(zip(needed, pool.map(try_control, needed), strict=True))
    return {control.name: why for control, why in found.items()}


def _say(trial: Trial) -> None:
    line = f"{trial.mutant.name} (seed {trial.seed}, {trial.seconds:.0f} s): {trial.ending}"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
