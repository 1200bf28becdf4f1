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


class Raising(Reference):
    """Its launch raises."""

    name = "raising"

    def prepare(self, plan: CopyPlan) -> Any:
        def launch(*arguments: Any) -> None:
            raise RuntimeError("the firmware is on fire")

        return launch


class Hanging(Reference):
    """Its launch never returns."""

    name = "hanging"

    def prepare(self, plan: CopyPlan) -> Any:
        def launch_for_ever(*arguments: Any) -> None:
            while True:
                time.sleep(0.05)

        return launch_for_ever


class Crashing(Reference):
    """Its launch takes the process with it."""

    name = "crashing"

    def prepare(self, plan: CopyPlan) -> Any:
        def launch(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGSEGV)

        return launch


class Chatty(Reference):
    """Right, but it prints to both outputs, also past Python."""

    name = "chatty"

    def prepare(self, plan: CopyPlan) -> Any:
        inner = super().prepare(plan)

        def launch(*arguments: Any) -> Any:
            print('{"event": "finish"}')
            print("half a line", end="", file=sys.stderr)
            os.write(1, b'{"event": "end"}\n')
            os.write(2, b"past Python\n")
            return inner(*arguments)

        return launch


class Nonsense(Reference):
    """Claims what no claim can be."""

    name = "nonsensical"

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=super().capabilities().places,
            index_on="nowhere",
            index_dtypes=frozenset({torch.float32}),
            alignment=-3,
        )


class NoClaims(Reference):
    """Claims by a word."""

    name = "wordy"

    def capabilities(self) -> Capabilities:
        return "all of it"  # type: ignore[return-value]


class Secretive(Reference):
    """It does not say what it claims."""

    name = "secretive"

    def capabilities(self) -> Capabilities:
        raise OSError("the licence server is asleep")


class Deadly(Reference):
    """Its probe takes the process with it."""

    name = "deadly"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().probe(device)
