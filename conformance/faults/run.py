# SPDX-License-Identifier: Apache-2.0
"""Run the faults over a tier, some at a time, and record what each came to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from portakv_conformance.faults.subject import (
    Died,
    Hung,
    NotInjected,
    Raised,
    Template,
    Unavailable,
)
from portakv_conformance.faults.table import FAULTS, PROCESS, Fault
from portakv_conformance.faults.trial import Ended, Outcome, Trial, new_root

#: The trial without a fault, whose outcome says what the others can be compared with.
CONTROL = "no fault"


class Row(NamedTuple):
    """What one fault came to.

    Attributes:
        fault: its name.
        means: by which it was put in.
        outcome: the worst of all calls.
        notes: what happened, a clause each.
        promised: blocks that a lookup still reported after a load did not bring them.
        seconds: of the trial.
    """

    fault: str
    means: str
    outcome: Outcome
    notes: list[str]
    promised: int
    seconds: float


def control(trial: Trial) -> None:
    """Store, load, and load again after a restart, without a fault."""
    trial.start()
    trial.put()
    trial.get()
    trial.stop()
    before = trial.outcome
    if before != "right":
        raise Unavailable(
            f"Expected a tier that brings back what it stored, got {before} without a fault: "
            f"{', '.join(trial.notes)}. Correct --terms, or install what is missing."
        )
    trial.start()
    trial.get()


def run_fault(
    fault: Fault, template: Template, nbytes: int, deadline: float, folder: Path | None
) -> Row:
    """Run one fault in a new folder; raise `Unavailable` if the tier cannot be used at all."""
    began = time.monotonic()
    reason = ""
    with new_root(folder) as name:
        trial = Trial(template, nbytes, deadline, Path(name))
        try:
            fault.run(trial)
        except Ended:
            pass
        except NotInjected as error:
            reason = str(error)
        except Hung as error:
            trial.add("hang", str(error))
        except (Died, Raised) as error:
            trial.add("error", str(error))
        finally:
            trial.end()
    took = round(time.monotonic() - began, 1)
    if reason:
        return Row(fault.name, fault.means, "not injected", [reason], 0, took)
    notes = [*dict.fromkeys(note.replace(str(trial.folder), "{folder}") for note in trial.notes)]
    return Row(fault.name, fault.means, trial.outcome, notes, trial.promised, took)


def chosen(only: Collection[str]) -> list[Fault]:
    """Return the faults whose names begin with some texts; all if there are none.

    Raises `KeyError` with a text that no name begins with.
    """
    for text in only:
        if not any(fault.name.startswith(text) for fault in FAULTS):
            raise KeyError(text)
    return [each for each in FAULTS if not only or each.name.startswith(tuple(only))]


def run_faults(
    template: Template,
    faults: Sequence[Fault],
    nbytes: int,
    deadline: float,
    folder: Path | None = None,
    jobs: int = 1,
    show: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Run the control and the faults; return a row each, in their order.

    Args:
        nbytes: of a block.
        deadline: seconds in which each call has to return; a call that does not is a hang.
        folder: in which each trial makes its own; None: the system's folder for temporary files.
        jobs: trials that run together.
        show: gets each row as it comes.

    Raises `Unavailable` if the tier does not work without a fault.
    """
    lock = threading.Lock()

    def work(fault: Fault) -> Row:
        row = run_fault(fault, template, nbytes, deadline, folder)
        with lock:
            show(row)
        return row

    rows = [work(Fault(CONTROL, PROCESS, control))]
    if rows[0].outcome not in ("right", "miss"):
        raise Unavailable(
            f"Expected a tier that brings back what it stored, got {rows[0].outcome} without a "
            f"fault: {', '.join(rows[0].notes)}. Correct --terms, or install what is missing."
        )
    pool = ThreadPoolExecutor(jobs)
    try:
        rows.extend(pool.map(work, faults))
    finally:  # after an interrupt, those that run end, and no other one begins
        pool.shutdown(cancel_futures=True)
    return rows
