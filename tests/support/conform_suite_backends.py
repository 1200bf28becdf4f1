# SPDX-License-Identifier: Apache-2.0
"""Backends with one fault each, for the tests of the suite itself and of its runner."""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from threading import Timer
from time import sleep
from types import SimpleNamespace
from typing import Any

import torch

from portakv import CopyPlan, Index, Unsupported
from portakv.backends.base import Capabilities, Decision
from portakv.backends.reference import Reference


class Right(Reference):
    """Nothing is wrong with it; it does what `reference` does. Subclasses are named by class."""

    name = "suite-right"

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if "name" not in cls.__dict__:
            cls.name = "suite" + re.sub(r"(?=[A-Z])", "-", cls.__name__).lower()

    def prepare(self, plan: CopyPlan) -> Any:
        return partial(self.carry, super().prepare(plan))

    def carry(self, real: Any, *arguments: Any) -> Any:
        """Launch; subclasses change it."""
        return real(*arguments[:5], None, None)


class OffByOne(Right):
    """It reads the slot after the requested one if the list of ids is long."""

    def carry(self, real: Any, *arguments: Any) -> Any:
        src, dst, own, *rest = arguments
        if own.ids is not None and own.ids.numel() > 2:
            own = Index((own.ids + 1) % (src.slots // own.step), own.step, own.offset)
        return super().carry(real, src, dst, own, *rest)


class Talking(Right):
    """It prints to both outputs, also past Python, and none of this is an event."""

    def carry(self, real: Any, *rest: Any) -> Any:
        print('{"event": "finish"}')
        print("half a line", end="", file=sys.stderr)
        os.write(1, b'{"event": "end"}\n')
        os.write(2, b"past Python\n")
        return super().carry(real, *rest)


class Raising(Right):
    """It raises an error that is not PortaKV's, after it has written a part."""

    def carry(self, real: Any, *arguments: Any) -> Any:
        super().carry(real, *arguments)
        raise KeyError("stream")


class Waiting(Right):
    """It returns before it has begun, with a `Pending` that reports the truth."""

    def carry(self, real: Any, *rest: Any) -> Any:
        later = Timer(0.02, super().carry, (real, *rest))
        later.start()
        return SimpleNamespace(done=lambda: not later.is_alive(), wait=later.join)


class Modest(Right):
    """It claims little: aligned rows in one allocation, in two loops."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), alignment=16, max_loops=2, tables=False)


class Lax(Modest):
    """It accepts plans that it does not claim."""

    def check(self, plan: CopyPlan) -> Decision:
        return Decision(self.name, True, "takes everything")


class WholeChunks(Right):
    """Its launch refuses a part of a chunk; check and prepare accept it."""

    def carry(self, real: Any, *arguments: Any) -> Any:
        src, dst, own, other, count = arguments[:5]
        for view, index in ((src, own), (dst, other)):
            if index.ids is None and count < view.slots:
                raise Unsupported("A part of a chunk", "it moves whole ones")
        return super().carry(real, *arguments)


class Noting(Right):
    """It notes the requested plans in the file that the environment names."""

    def prepare(self, plan: CopyPlan) -> Any:
        with open(os.environ["SUITE_PLANS"], "a", encoding="utf-8") as file:
            file.write(f"{plan}\n")
        return super().prepare(plan)


class Absent(Right):
    """It is not for this machine."""

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, False, "its driver is from another century")


class Namesake(Right):
    """It has the name of another backend."""

    name = "reference"


# -- backends that harm their process --------------------------------------------------------------


class Hanging(Right):
    """Its launch never returns."""

    def carry(self, real: Any, *rest: Any) -> Any:
        while True:
            sleep(0.05)


class Crashing(Right):
    """Its launch takes the process with it."""

    def carry(self, real: Any, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)


class Nonsense(Right):
    """It claims impossible values."""

    def capabilities(self) -> Capabilities:
        dtypes = frozenset({torch.float32})
        places = super().capabilities().places
        return Capabilities(places, "nowhere", dtypes, alignment=-3)


class NoClaims(Right):
    """It claims by a word."""

    def capabilities(self) -> Capabilities:
        return "all of it"  # type: ignore[return-value]


class Secretive(Right):
    """It raises instead of claims."""

    def capabilities(self) -> Capabilities:
        raise OSError("the licence server is asleep")


class Deadly(Right):
    """Its probe takes the process with it."""

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().probe(device)
