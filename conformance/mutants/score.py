# SPDX-License-Identifier: Apache-2.0
"""The score of the suite, `portakv conform --mutants`: every mutant has to be caught, under every
seed. Exit code 0 if all are and the un-mutated bases pass, else 1: also if one was not judged."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

from portakv.cli.console import print_rows
from portakv.registry.registry import ENVIRONMENT, SelfCheck, self_check
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.mutants import CONTROLS, MUTANTS, Mutant
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.options import whole_number
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.runner import BadRequest, Options, SubjectUnavailable, SuiteBroken, run
from portakv_conformance.run.workers import INTERRUPTED

#: Seconds that one case may take of a mutant, and a mutant in all.
CASE_LIMIT = 60.0
WALL_LIMIT = 300.0

_JOBS = 2
_UNJUDGED = (BadRequest, SubjectUnavailable, SuiteBroken)
Runner = Callable[..., RunRecord]


@dataclass(frozen=True)
class Trial:
    """The result of a mutant under one seed: the first case that failed, or an empty text; its
    message, or why there is no verdict; the seconds until then; whether the suite got to judge it.
    """

    mutant: Mutant
    seed: int
    caught_by: str
    reason: str
    seconds: float
    judged: bool = True

    @property
    def ending(self) -> str:
        """Describe the result in a few words."""
        lost = "SURVIVES" if self.judged else "NOT JUDGED"
        return f"caught by {self.caught_by}" if self.caught_by else f"{lost}: {self.reason}"


class _Clock(Progress):
    """Ends a run when its time is over, with a TimeoutError."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def started(self, id: str) -> None:
        if time.monotonic() > self._until:
            raise TimeoutError(f"it was not caught within {self._seconds:g} s")


def try_mutant(
    mutant: Mutant, seed: int = 0, *, most_seconds: float = WALL_LIMIT, runner: Runner = run
) -> Trial:
    """Run the suite on a mutant, up to its first failure.

    A case in error does not catch the mutant: the suite itself is at fault then.
    """
    began = time.monotonic()
    where = (mutant.target(), mutant.device_type, mutant.profile)
    options = Options(*where, seed, limit=CASE_LIMIT, exit_first=True)
    caught = ""
    why = "every case passed"
    judged = True
    try:
        wrong = _wrong(runner(options, _Clock(most_seconds)))
        failed = next((case for case in wrong if case.status == "failed"), None)
        if failed is not None:
            caught = failed.id
            why = failed.reason
        elif wrong:
            why = f"{wrong[0].id} is in error: {wrong[0].reason}"
    except (TimeoutError, *_UNJUDGED) as error:
        why = str(error).partition("\n")[0]
        judged = isinstance(error, TimeoutError)
    return Trial(mutant, seed, caught, why, time.monotonic() - began, judged)


def _wrong(record: RunRecord) -> list[CaseRecord]:
    return [case for case in record.cases if case.status in WRONG]


def try_control(control: Mutant, seed: int = 0, *, runner: Runner = run) -> str | None:
    """Run the full suite on an base without a bug; return None if it passes, else why not."""
    try:
        record = runner(Options(control.target(), control.device_type, "full", seed))
    except _UNJUDGED as error:
        return str(error).partition("\n")[0]
    if wrong := _wrong(record):
        return f"{len(wrong)} cases fail, the first is {wrong[0].id}: {wrong[0].reason}"
    return None if record.verdict == "conformant" else "; ".join(record.missing)


def fails_self_check(mutant: Mutant) -> bool:
    """Return True if the registry's self-check rejects a mutant before any user's copy."""
    device = mutant.device_type
    if device != "cpu":
        from portakv_conformance import simdev

        if simdev.available() is not None:
            return False
        simdev.load(device)
        device += ":0"
    return self_check(mutant(torch.device(device)))[0] is SelfCheck.FAILED


def print_mutants() -> None:
    """Print each mutant by the kind of its bug, with the target that `portakv conform` takes."""
    for module, mutants in groupby(MUTANTS, key=lambda mutant: mutant.__module__):
        title = (sys.modules[module].__doc__ or "").partition("\n")[0]
        print(f"\n{title}")
        for mutant in mutants:
            print(f"- {mutant.name}: {mutant.bug()}\n    {mutant.target()}")


def by_mutant(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Return the trials of each mutant, in the order of the mutants."""
    return [list(group) for _, group in groupby(trials, key=lambda trial: trial.mutant.name)]


def _sum(groups: list[list[Trial]]) -> str:
    runs = len(groups[0]) if groups else 1
    caught = sum(all(trial.caught_by for trial in group) for group in groups)
    how = "" if runs == 1 else f" in {runs} runs of {runs}, each with another seed"
    unjudged = sum(not any(trial.judged for trial in group) for group in groups)
    rest = f" {unjudged} could not be judged here." if unjudged else ""
    return f"{caught} of {len(groups)} mutants are caught{how}.{rest}"


def _row(group: Sequence[Trial], self_checked: Collection[str]) -> tuple[str, ...]:
    first = group[0]
    mutant = group[0].mutant
    where = mutant.profile + (f", {mutant.device_type}" if mutant.device_type != "cpu" else "")
    lost = "**survives**" if first.judged else "not judged"
    case = f"`{first.caught_by.removeprefix('cases/')}`" if first.caught_by else lost
    if len(group) > 1:
        case += f" ({sum(bool(trial.caught_by) for trial in group)} of {len(group)})"
    if mutant.name in self_checked:
        case += "; the self-check too"
    return mutant.name, mutant.bug(), where, case, f"{first.seconds:.0f}"


def print_score(
    trials: Sequence[Trial], self_checked: Collection[str], controls: Mapping[str, str | None]
) -> None:
    """Print the table, the survivors and the sum on standard output."""
    groups = by_mutant(trials)
    titles = ["mutant", "bug", "profile", "caught by", "s"]
    rows = [_row(group, self_checked) for group in groups]
    print_rows(titles, rows, prose=["bug", "profile", "s"], right=["s"])
    for name, why in controls.items():
        print(f"{name}, un-mutated: {'passes' if why is None else f'FAILS: {why}'}")
    for trial in trials:
        if not trial.caught_by:
            lost, _, why = trial.ending.partition(": ")
            name = f"{trial.mutant.name} ({trial.mutant.target()})"
            print(f"{lost} under seed {trial.seed}: {name}: {why}")
    print(_sum(groups))


def score(
    mutants: Sequence[Mutant],
    seeds: Sequence[int],
    *,
    jobs: int = _JOBS,
    attempt: Callable[[Mutant, int], Trial] = try_mutant,
    tell: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Try every mutant under every seed, ``jobs`` at a time; in the order of mutants and seeds.
    ``tell`` is given each trial as it ends."""
    with _ending_with_the_caller(jobs) as pool:
        futures = [pool.submit(attempt, mutant, seed) for mutant in mutants for seed in seeds]
        for future in as_completed(futures):
            tell(future.result())
    return [future.result() for future in futures]


@contextmanager
def _ending_with_the_caller(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for runs of the suite; where the caller is interrupted, no run begins or goes on."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    except BaseException:  # Ctrl-C, or any failure of the caller: end the runs that go on
        INTERRUPTED.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        INTERRUPTED.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the score; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        print_mutants()
        return 0
    if os.environ.get(ENVIRONMENT):
        parser.error(f"{ENVIRONMENT} forces another backend than the mutant; unset it")
    if unknown := sorted(set(args.only or ()) - {mutant.name for mutant in MUTANTS}):
        parser.error(f"no mutant is named {unknown[0]!r}; --list prints the names")
    mutants = [one for one in MUTANTS if args.only is None or one.name in args.only]
    # Two processes on two cores: threads of torch's own would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    devices = {mutant.device_type for mutant in mutants if not args.no_control}
    needed = [control for control in CONTROLS if control.device_type in devices]
    with _ending_with_the_caller(_JOBS) as pool:
        names = [control.name for control in needed]
        controls = dict(zip(names, pool.map(try_control, needed), strict=True))
    trials = score(
        mutants,
        range(args.seed, args.seed + args.runs),
        jobs=args.jobs,
        tell=_say,
        attempt=lambda mutant, seed: try_mutant(mutant, seed, most_seconds=args.limit),
    )
    known = {mutant.name for mutant in mutants if fails_self_check(mutant)}
    print_score(trials, known, controls)
    return 1 if any(not trial.caught_by for trial in trials) or any(controls.values()) else 0


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
    add("--list", action="store_true", help="print each mutant with its bug, and run nothing")
    return parser


def _say(trial: Trial) -> None:
    line = f"{trial.mutant.name} (seed {trial.seed}, {trial.seconds:.0f} s): {trial.ending}"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
