# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`: a model's KV cache out and back, then the backends checked and timed.

The demo stands above the whole library: it calls what a user calls, and the bytes that it expects
come from plain torch indexing alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from portakv import __version__
from portakv.cli.candidates import as_json, candidates_for
from portakv.cli.console import print_json
from portakv.cli.demo import screen
from portakv.cli.demo.model import ModelPart, run_model
from portakv.cli.demo.moves import Row, measured
from portakv.cli.demo.scenario import FOUNDING, Founding, Scenario, fitted, free_memory
from portakv.registry.registry import ENVIRONMENT, REGISTRY, choose
from portakv.runtime.devices import device_name, usual_device

__all__ = ["run_demo"]


def run_demo(*, device: str | None = None, json: bool = False) -> int:
    """Run the demo.

    Args:
        device: a torch device; None: the accelerator where there is one, else the CPU.
        json: print one JSON object and nothing else.

    Returns:
        The exit code: 0 where logits were bit-identical and every byte was right, else 1.

    Raises:
        BackendUnavailable: no backend serves the device, or not the forced one; before any work.
        Unsupported: the backend that ``PORTAKV_BACKEND`` forces does not take one of the copies.
    """
    choice = choose(usual_device() if device is None else device)
    demo = _Demo(choice.backend.device, os.environ.get(ENVIRONMENT) or None, choice.name)
    return demo.print_json() if json else demo.print_text()


@dataclass(frozen=True)
class _Demo:
    """A device, what the environment forces, and what the registry chose."""

    device: torch.device
    forced: str | None
    chosen: str

    def print_text(self) -> int:
        """Run and tell each part as it ends."""
        began = time.perf_counter()
        screen.tell_heading(self.device, self.forced)
        model = run_model(self.device, screen.tell_line)
        scenario, serving = self._scenario(), self._serving()
        screen.tell_scenario(scenario, self.device, serving)
        rows, threads = self._rows(scenario, serving)
        screen.tell_rows(rows, threads)
        screen.tell_choice(candidates_for(self.device), self.device, self.forced, serving)
        screen.tell_verdict(model, rows, time.perf_counter() - began)
        return _exit_code(model, rows)

    def print_json(self) -> int:
        """Run and print one object."""
        model = run_model(self.device, lambda line: None)
        scenario = self._scenario()
        rows, threads = self._rows(scenario, self._serving())
        code = _exit_code(model, rows)
        print_json(
            {
                "portakv": __version__,
                "torch": str(torch.__version__),
                "device": str(self.device),
                "device_name": device_name(self.device),
                "forced": self.forced,
                "model": model.as_json(),
                "scenario": scenario.as_json(),
                "threads": threads,
                "moves": [row.as_json() for row in rows],
                "chosen": self.chosen,
                "candidates": as_json(candidates_for(self.device)),
                "ok": code == 0,
            }
        )
        return code

    def _scenario(self) -> Scenario:
        return fitted(FOUNDING, free_memory(self.device))

    def _serving(self) -> list[str]:
        """The backends that the registry may choose here; the forced one alone if there is one."""
        names = [self.chosen] if self.forced else REGISTRY.automatic(self.device)
        return [n for n in names if REGISTRY.ask(n, self.device, check=True)[0] is not None]

    def _rows(self, scenario: Scenario, serving: list[str]) -> tuple[list[Row], int | None]:
        return measured(Founding(self.device, scenario), serving, self.forced is not None)


def _exit_code(model: ModelPart, rows: list[Row]) -> int:
    return 0 if model.good and all(row.good for row in rows) else 1
