# SPDX-License-Identifier: Apache-2.0
"""The request of a run of the suite, and the command that repeats it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from portakv_conformance.judge.waivers import Waiver

#: Seconds that one case may take; more if ``--fuzz`` draws many examples in it.
CASE_LIMIT = 120.0
_EXAMPLES_A_SECOND = 5
# What changes which kernel runs, and so belongs to the command that repeats a run.
_INTERPRET = "TRITON_INTERPRET"
_CASES = "cases/"


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    backend: str  # a registered name or ``pkg.mod:Class``
    device: str = "cpu"
    profile: str = "core"
    seed: int = 0  # of every pattern and drawing
    fuzz: int = 0  # examples drawn in each drawn case; 0: the profile's own numbers
    waivers: tuple[Waiver, ...] = ()  # cases that may fail
    waiver_file: str = ""  # where those stand
    limit: float | None = None  # seconds that one case may take; None: as `seconds` says
    exit_first: bool = False
    only: tuple[str, ...] = ()  # ids to run; empty: all of the profile
    emulated: bool = False  # the simulated device carries the name of ``device``
    examples: Path | None = None  # an existing folder for failing examples that were shrunken
    jobs: int = 1  # workers at a time

    @property
    def seconds(self) -> float:
        """Return the limit of one case, in seconds."""
        return self.limit or CASE_LIMIT + self.fuzz / _EXAMPLES_A_SECOND

    def command(self, *only: str) -> str:
        """Return the command that repeats this run, or only some of its cases."""
        words = ["portakv", "conform", self.backend, *self._shared("--")]
        words += ["--waivers", self.waiver_file] if self.waivers and not only else []
        words += ["--limit", f"{self.limit:g}"] if self.limit else []
        words += ["--jobs", str(self.jobs)] if self.jobs > 1 and not only else []
        chosen = only or self.only
        words += ["--only", *chosen] if chosen else []
        variable = f"{_INTERPRET}={os.environ[_INTERPRET]} " if _INTERPRET in os.environ else ""
        return variable + shlex.join(words)

    def suite_options(self) -> list[str]:
        """Return the same as options of the pytest plugin, except for ``only``."""
        saved = ["--portakv-examples", str(self.examples.resolve())] if self.examples else []
        return ["--portakv-backend", self.backend, *self._shared("--portakv-"), *saved]

    def _shared(self, start: str) -> list[str]:
        """Return the options that both commands have, whose names begin so."""
        words = [f"{start}device", self.device, f"{start}profile", self.profile]
        words += [f"{start}seed", str(self.seed)]
        words += [f"{start}fuzz", str(self.fuzz)] if self.fuzz else []
        return words + [f"{start}emulated"] * self.emulated


def chosen(ids: Sequence[str], words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the ids that words mean, in the order of ``ids``, and the words that mean none.

    A word is an id, ``file::test`` for all its parameters, a file for all its tests, else any
    beginning of ids; ``cases/`` and ``.py`` need not be written.
    """
    wanted = {
        word: {id for id in ids if _means(word, id)} or {id for id in ids if _begins(word, id)}
        for word in words
    }
    chosen = set().union(*wanted.values())
    return [id for id in ids if id in chosen], [word for word, some in wanted.items() if not some]


def counted(cases: int) -> str:
    """Return a count such as ``1 case was`` or ``2 cases were``."""
    return "1 case was" if cases == 1 else f"{cases:,} cases were"


def _means(word: str, id: str) -> bool:
    file, _, test = id.removeprefix(_CASES).partition("::")
    wanted_file, _, wanted_test = word.removeprefix(_CASES).partition("::")
    same_file = wanted_file.removesuffix(".py") == file.removesuffix(".py")
    return same_file and wanted_test in ("", test, test.partition("[")[0])


def _begins(word: str, id: str) -> bool:
    prefix = word.removeprefix(_CASES)
    short = id.removeprefix(_CASES)
    return word != "" and (short.startswith(prefix) or short.replace(".py", "").startswith(prefix))
