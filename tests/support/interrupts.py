# SPDX-License-Identifier: Apache-2.0
"""Replay a scenario with an interrupt at each line that the caller's thread runs in the library."""

from __future__ import annotations

import dis
import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

import portakv
from portakv.runtime import interrupts
from portakv.runtime.interrupts import uninterrupted
from support.waits import LIMIT

LIBRARY = Path(portakv.__file__).parent
#: Seconds that a judge waits for anything; nothing takes as long.
#: How often an interrupt comes at one line.
MOST = 8

#: A scenario prepares its objects, yields what is to be interrupted, and then judges what is left.
Scenario = Callable[[Path], Generator[Callable[[], object], None, None]]


class Place(NamedTuple):
    """The ``hit``-th time that a line of a file runs."""

    file: str
    line: int
    hit: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line} (time {self.hit})"


def files_of(*folders: str) -> dict[str, str]:
    """Return the short names of all files of the library below folders, by their paths."""
    result = dict[str, str]()
    for folder in folders:
        place = LIBRARY / folder
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            result[str(path)] = str(path.relative_to(LIBRARY))
    return result


class Lines:
    """Counts lines of files that run in this thread, and raises at a place."""

    def __init__(self, files: dict[str, str], at: Place | None = None) -> None:
        self.hits = Counter[tuple[str, int]]()
        self.raised = False
        self._files = files
        self._at = at

    def run(self, act: Callable[[], object]) -> None:
        """Run ``act``; of what it raises only the interrupt is expected."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            act()
        except KeyboardInterrupt:
            if not self.raised:
                raise
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files or _finalizes(frame):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lasti not in _ends_of_with(frame.f_code):
            at = self._files[frame.f_code.co_filename], frame.f_lineno
            self.hits[at] += 1
            if self._at == (*at, self.hits[at]):
                self.raised = True
                raise KeyboardInterrupt
        return self._line


@cache
def _ends_of_with(code: CodeType) -> frozenset[int]:
    """Return where a ``with`` statement begins to call ``__exit__``, which it found when it began.

    Python looks at signals after a call and inside a function, so none comes between the last call
    of the body and that one.
    """
    listed = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    none = [each.opname == "LOAD_CONST" and each.argval is None for each in listed]
    ends = set[int]()
    for number, each in enumerate(listed):
        first = number + (each.opname in ("SWAP", "POP_BLOCK", "ROT_TWO"))
        first += listed[first].opname == "ROT_TWO" if first < len(listed) else 0
        three = listed[first : first + 3]
        same = all(none[first + nth] or one.opname == "DUP_TOP" for nth, one in enumerate(three))
        if len(three) == 3 and none[first] and same:
            ends.add(each.offset)
    return frozenset(ends)


def _finalizes(frame: FrameType) -> bool:
    """Return True below a finalizer: nothing that it raises reaches the caller."""
    above: FrameType | None = frame
    while above is not None and above.f_code.co_name != "__del__":
        above = above.f_back
    return above is not None


def replay(
    scenario: Scenario, folder: Path, files: dict[str, str], at: Place | None = None
) -> Lines:
    """Run a scenario, with an interrupt at a place; raises what its judge finds wrong."""
    before = open_files()
    lines = Lines(files, at)
    steps = scenario(folder)
    try:
        lines.run(next(steps))
        next(steps, None)
    finally:
        steps.close()
    del steps
    assert settles(lambda: not (open_files() - before)), f"left open: {open_files() - before}"
    return lines


def places(lines: Lines, every: bool) -> Iterator[Place]:
    """Yield the places of a clean run: each line once, or each time that it runs, `MOST` times at
    most. A loop that waits for an end runs tens of thousands of times."""
    for (file, line), hits in lines.hits.items():
        for hit in range(1, (min(hits, MOST) if every else 1) + 1):
            yield Place(file, line, hit)


def orphans(
    scenario: Scenario, folder: Path, files: dict[str, str], *, every: bool = False, most: int = 5
) -> tuple[list[str], int]:
    """Return what interrupts leave, at most so many of them, and the number of interrupts."""
    for act in scenario(folder / "warm"):  # a process makes some things once
        act()
    clean = replay(scenario, folder / "clean", files)
    leaks = list[str]()
    count = 0
    for number, place in enumerate(places(clean, every)):
        try:
            count += replay(scenario, folder / str(number), files, place).raised
        except Exception as error:
            leaks.append(f"{place}: {type(error).__name__}: {str(error)[:500]}")
            if len(leaks) >= most:
                break
    return leaks, count


def reach(
    scenarios: Sequence[Scenario], folder: Path, files: dict[str, str], kinds: Sequence[type]
) -> tuple[set[str], set[str], list[tuple[str, int]], int]:
    """Return the public functions of classes, the functions that scenarios call in this thread,
    the lines of these that they do not run, and how many lines these have.

    A helper runs the lines of functions that are `shielded`, which count as called."""
    run = set[tuple[str, int]]()
    shielded = set[str]()

    def note(work: partial[Any]) -> Any:
        shielded.add(work.func.__qualname__)
        return uninterrupted(work)

    with patch.object(interrupts, "uninterrupted", note):
        for number, scenario in enumerate(scenarios):
            for act in scenario(folder / "warm"):
                act()
            run |= {*replay(scenario, folder / str(number), files).hits}
    lines = function_lines(files)
    called = {(file, lines[file, line]) for file, line in run if (file, line) in lines}
    public = {
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, member in vars(kind).items()
        if not name.startswith("_") and isinstance(member, FunctionType | classmethod | property)
    }
    of_called = {at for at, name in lines.items() if (at[0], name) in called}
    return public, shielded | {name for _, name in called}, sorted(of_called - run), len(of_called)


def settles(holds: Callable[[], bool], seconds: float | None = None) -> bool:
    """Wait until something holds; return False if it does not in time."""
    until = time.monotonic() + (LIMIT if seconds is None else seconds)
    while not holds():
        if time.monotonic() > until:
            return False
        gc.collect()
        time.sleep(0.005)
    return True


def open_files() -> Counter[str]:
    """Return the targets of this process's descriptors, except for memory without a name."""
    targets = Counter[str]()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            targets[os.readlink(f"/proc/self/fd/{number}")] += 1
    return Counter({name: n for name, n in targets.items() if "deleted" not in name})


def function_lines(files: dict[str, str]) -> dict[tuple[str, int], str]:
    """Return the function of each line of code that is inside one."""
    result = dict[tuple[str, int], str]()
    for path, name in files.items():
        module = compile(Path(path).read_text(encoding="utf-8"), path, "exec")
        for qualified, code in _codes(module, ""):
            if not code.co_flags & 0x2:  # no function: its names are not local
                continue
            for _, _, line in code.co_lines():
                if line is not None and line != code.co_firstlineno:
                    result.setdefault((name, line), qualified)
    return result


def _codes(code: CodeType, above: str) -> Iterator[tuple[str, CodeType]]:
    """Return the codes inside one, with the names of the classes and functions that they are in."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield above + inner.co_name, inner
            yield from _codes(inner, f"{above}{inner.co_name}.")


def in_other_thread(work: Callable[[], Any]) -> Any:
    """Return ``work()``, run in a thread; raises if it does not end: it waits for a lock."""
    result = Future[Any]()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(LIMIT)
    except Late:
        raise AssertionError("it hangs") from None


def by_width(scenarios: Sequence[Any], wide: Sequence[Any]) -> list[Any]:
    """Return the scenarios as parameters; those that take many seconds are run by ``-m full``."""
    return [
        pytest.param(each, id=each.__name__, marks=pytest.mark.full if each in wide else ())
        for each in scenarios
    ]
