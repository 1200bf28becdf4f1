# SPDX-License-Identifier: Apache-2.0
"""Backends that behave badly towards the process they run in, for tests of the runner."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from portakv import CopyPlan
from portakv.backends.base import Capabilities, Decision
from portakv.backends.reference import Reference


class Bad(Reference):
    """`reference` with a launch of its own, named after its class."""

    name = "bad"

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.name = cls.__name__.lower()

    def prepare(self, plan: CopyPlan) -> Any:
        return self.launch

    @staticmethod
    def launch(*arguments: Any) -> None:
        """What a subclass does wrong."""


class Raising(Bad):
    """Its launch raises."""

    @staticmethod
    def launch(*arguments: Any) -> None:
        raise RuntimeError("the firmware is on fire")


class Hanging(Bad):
    """Its launch never returns."""

    @staticmethod
    def launch(*arguments: Any) -> None:
        launch_for_ever()


def launch_for_ever() -> None:
    while True:
        time.sleep(0.05)


class Crashing(Bad):
    """Its launch takes the process with it."""

    @staticmethod
    def launch(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Chatty(Bad):
    """Right, but it prints to both outputs, also past Python."""

    def prepare(self, plan: CopyPlan) -> Any:
        inner = Reference.prepare(self, plan)

        def launch(*arguments: Any) -> Any:
            print('{"event": "finish"}')
            print("half a line", end="", file=sys.stderr)
            os.write(1, b'{"event": "end"}\n')
            os.write(2, b"past Python\n")
            return inner(*arguments)

        return launch


class Nonsense(Bad):
    """Claims what no claim can be."""

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=super().capabilities().places,
            index_on="nowhere",
            index_dtypes=frozenset({torch.float32}),
            alignment=-3,
        )


class NoClaims(Bad):
    """Claims by a word."""

    def capabilities(self) -> Capabilities:
        return "all of it"  # type: ignore[return-value]


class Secretive(Bad):
    """It does not say what it claims."""

    def capabilities(self) -> Capabilities:
        raise OSError("the licence server is asleep")


class Deadly(Bad):
    """Its probe takes the process with it."""

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().probe(device)
