# SPDX-License-Identifier: Apache-2.0
"""One trial: a tier in a new folder, what is done to it, and what it delivered."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from portakv_conformance.faults import places
from portakv_conformance.faults.intercept import Interceptor, Rule
from portakv_conformance.faults.payload import payload
from portakv_conformance.faults.places import Place
from portakv_conformance.faults.subject import Child, Died, Hung, NotInjected, Raised, Template

Outcome = Literal["wrong bytes", "hang", "error", "miss", "right", "not injected"]
#: Every outcome, worst first.
OUTCOMES: tuple[Outcome, ...] = ("wrong bytes", "hang", "error", "miss", "right", "not injected")
#: The blocks of a trial, and those that are stored later.
KEYS = range(8)
LATER = range(8, 16)
MODEL = "org/model"
OTHER_MODEL = "org/other"
#: Seconds after which memory that an engine reuses is read again.
SETTLED = 1.0
#: Seconds for a tier to close while a call of it is held.
CLOSING = 15.0


class Ended(Exception):
    """The trial cannot go on; its outcome stands."""


class Trial:
    """A tier in a new folder.

    Args:
        template: the tier, imported.
        nbytes: of a block.
        deadline: seconds in which each call has to return.
        root: where the folder is made.

    Attributes:
        folder: of the tier.
        notes: what happened, a clause each, in order.
        promised: blocks that a lookup reported and a load did not bring.
        injected: how often the fault was put in.
    """

    def __init__(self, template: Template, nbytes: int, deadline: float, root: Path) -> None:
        self.template = template
        self.nbytes = nbytes
        self.deadline = deadline
        self.root = root
        self.folder = root / "tier"
        self.folder.mkdir(mode=0o700)
        self.notes: list[str] = []
        self.promised = 0
        self.injected = 0
        self._worst: list[Outcome] = []
        self._children: list[Child] = []
        self.child: Child | None = None

    # --- the tier

    def start(
        self, kinds: Collection[str] = (), model: str = MODEL, rule: Rule | None = None
    ) -> None:
        """Open the tier in a new process.

        Args:
            kinds: of the system calls that can be answered.
            model: whose blocks are stored.
            rule: answers calls from the opening on.
        """
        log = self.root / "log"
        self.child = self.template.fork(self.folder, log, model, kinds, self.deadline)
        self._children.append(self.child)
        if rule is not None:
            self.arm(rule)
        self._tried("open")

    def second(self, model: str = MODEL) -> Child:
        """Return another process that has the tier, not open."""
        other = self.template.fork(self.folder, self.root / "log", model, (), self.deadline)
        self._children.append(other)
        return other

    def stop(self, close: bool = True) -> None:
        """End the tier's process, by default after the tier was closed."""
        if self.child is not None and close:
            with suppress(Ended):
                self._tried("close")
        self.kill()

    def kill(self) -> None:
        """Kill the tier's process."""
        if self.child is not None:
            self.child.end()
            self._children.remove(self.child)
            self.child = None

    def end(self) -> None:
        """Kill each process of the trial."""
        for child in self._children:
            child.end()
        self._children.clear()
        self.child = None

    @property
    def calls(self) -> Interceptor:
        """Return what answers the system calls of the tier's process."""
        assert self.child is not None
        assert self.child.calls is not None
        return self.child.calls

    def arm(self, rule: Rule) -> None:
        """Answer system calls by a rule from now on."""
        self.calls.rule = rule

    def lift(self, rule: Rule) -> None:
        """Let all system calls go on, and note how often the rule was used.

        Raises `NotInjected` if it was not.
        """
        if self.child is not None and self.child.calls is not None:
            self.child.calls.release()
            if self.child.calls.failure:
                raise NotInjected(self.child.calls.failure)
        if not rule.hits:
            named = " or ".join(rule.kinds)
            seen = "none" if not rule.seen else f"{rule.seen}, too few"
            raise NotInjected(f"of the calls to {named} files of the tier were seen: {seen}")
        self.injected += rule.hits

    # --- blocks

    def put(self, numbers: Sequence[int] = KEYS) -> int:
        """Store blocks; return how many the tier reports as stored."""
        stored = self._tried("put", [*numbers])
        if stored is None:
            return 0
        count = sum(map(bool, stored))
        if count < len(numbers):
            self.notes.append(f"{len(numbers) - count} of {len(numbers)} not stored")
        return count

    def get(
        self, numbers: Sequence[int] = KEYS, blind: bool = False, absent: Collection[int] = ()
    ) -> None:
        """Load blocks, and compare their bytes.

        Args:
            blind: without a lookup.
            absent: those of which any bytes are wrong.
        """
        result: Any = self._tried("load" if blind else "get", [*numbers])
        if result is None:
            return
        came, quiet = result
        self._compare(numbers, came, quiet, absent)
        if not blind:
            self._count_promised(numbers, came)

    def _count_promised(self, numbers: Sequence[int], came: Sequence[bytes | None]) -> None:
        """Count blocks that did not come, and that a lookup still reports."""
        missing = [number for number, block in zip(numbers, came, strict=True) if block is None]
        if missing:
            found = self._tried("exists", missing)
            self.promised += sum(found or ())

    def _compare(
        self,
        numbers: Sequence[int],
        came: Sequence[bytes | None],
        quiet: bool,
        absent: Collection[int],
    ) -> None:
        wrong = 0
        missing = 0
        for number, block in zip(numbers, came, strict=True):
            if block is None:
                missing += number not in absent
            elif number in absent or block != payload(number, self.nbytes, MODEL):
                wrong += 1
        if not quiet:
            self.add("wrong bytes", "memory of no block was written")
        if wrong:
            self.add("wrong bytes", f"{wrong} of {len(numbers)} blocks wrong")
        if missing:
            self.add("miss", f"{missing} of {len(numbers)} missing")
        if not wrong and not missing:
            self.add("right", "")

    def places(self, numbers: Sequence[int] = KEYS) -> dict[int, Place]:
        """Return where blocks lie in the files; raise `NotInjected` if one is not found."""
        blocks = {number: payload(number, self.nbytes, MODEL) for number in numbers}
        found = places.find(self.folder, blocks)
        if len(found) < len(blocks):
            raise NotInjected(
                f"the bytes of {len(blocks) - len(found)} of {len(blocks)} blocks are in no file"
            )
        return found

    # --- outcome

    def add(self, outcome: Outcome, note: str) -> None:
        """Add what a call came to."""
        self._worst.append(outcome)
        if note:
            self.notes.append(note)

    @property
    def outcome(self) -> Outcome:
        """Return the worst of what the calls came to."""
        return min(self._worst, key=OUTCOMES.index, default="right")

    def _tried(self, name: str, *args: object) -> Any:
        """Return the result of a call; None, and a note, if it raised.

        Raises `Ended` for a call that hangs, and for a process that died.
        """
        assert self.child is not None
        try:
            return self.child.call(name, *args)
        except Raised as error:
            self.add("error", str(error))
            if name == "open":
                raise Ended from None
            return None
        except Hung as error:
            self.add("hang", str(error))
            raise Ended from None
        except Died as error:
            self.add("error", str(error))
            raise Ended from None

    def dies(self, name: str, *args: object) -> None:
        """Make a call in which the process is killed."""
        assert self.child is not None
        try:
            self.child.call(name, *args)
        except Died:
            self.injected += 1
        except Raised as error:
            self.add("error", str(error))
        except Hung as error:
            self.add("hang", str(error))
        self.kill()

    def settle(self) -> None:
        """Give a late write the time to happen."""
        time.sleep(SETTLED)


def new_root(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Return a new folder for a trial, which is removed afterwards."""
    return tempfile.TemporaryDirectory(
        prefix="portakv-faults-", dir=parent, ignore_cleanup_errors=True
    )
