# SPDX-License-Identifier: Apache-2.0
"""Run the checks of a contract over one implementation, each with a time limit."""

from __future__ import annotations

import inspect
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

Subject = TypeVar("Subject")
#: Seconds that one check may take. A subject that does not return has failed.
PATIENCE = 60.0


class Violation(AssertionError):
    """A subject did not do what its contract says."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        name: of the check.
        promise: the sentence of the contract that it checks.
        failure: what came instead; None: the subject keeps the promise.
    """

    name: str
    promise: str
    failure: str | None


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One promise of a contract, and the function that raises `Violation` if it is broken."""

    name: str
    promise: str
    run: Callable[[Subject, Path], None]


def expect(holds: bool, failure: str) -> None:
    """Raise `Violation` with a sentence unless a condition holds."""
    if not holds:
        raise Violation(failure)


def run_threads(work: Callable[[int], None], seeds: Sequence[int]) -> None:
    """Run a function in one thread for each seed, and expect that every thread succeeds."""
    failures: list[str] = []

    def attempt(seed: int) -> None:
        try:
            work(seed)
        except Exception as error:  # reported below, in the thread of the check
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(not failures, f"of {len(threads)} threads {len(failures)} failed: {failures[:1]}")


def checks_of(module: ModuleType) -> list[Check[Subject]]:
    """Return the checks of a contract's module: its functions ``check_*``, in their order."""
    return [
        Check(name.removeprefix("check_"), inspect.getdoc(function) or "", function)
        for name, function in vars(module).items()
        if name.startswith("check_")
    ]


def run_checks(
    checks: Sequence[Check[Subject]],
    open_subject: Callable[[Path], AbstractContextManager[Subject]],
    patience: float = PATIENCE,
) -> list[Outcome]:
    """Run each check over a separate subject, in a separate folder.

    Args:
        open_subject: makes a subject that may use a folder, and closes it afterwards.
        patience: the seconds that a check may take, with opening and closing its subject.
    """
    return [
        Outcome(check.name, check.promise, _failure(check, open_subject, patience))
        for check in checks
    ]


def _failure(
    check: Check[Subject],
    open_subject: Callable[[Path], AbstractContextManager[Subject]],
    patience: float,
) -> str | None:
    """Return what went wrong in a check; None if nothing did."""
    failures: list[str] = []

    def judge() -> None:
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
                folder = Path(name)
                with open_subject(folder) as subject:
                    check.run(subject, folder)
        except Violation as error:
            failures.append(str(error))
        except Exception as error:  # a subject of another package raises whatever it raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            failures.append(f"{type(error).__name__} at {place}: {error}")

    # A subject that hangs leaves a daemon thread, which does not keep the process from ending.
    thread = threading.Thread(target=judge, name=f"contract {check.name}", daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        return f"it did not end in {patience:g} s"
    return failures[0] if failures else None
