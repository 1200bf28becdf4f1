# SPDX-License-Identifier: Apache-2.0
"""The case list that the installed suite has for a profile on a kind of device, which need not be
here.

As a pytest plugin of a worker that only collects it shows the suite another device than the one
that is there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.subject import SIMULATED
from portakv_conformance.run.journal import SuiteBroken
from portakv_conformance.run.request import Options
from portakv_conformance.run.workers import WorkerProcess, worker_command

_OPTION = "--portakv-listed-device"
_LIMIT = 300.0


def cases_of(profile: str, device: str) -> dict[str, dict[str, Any]]:
    """By id, ``area``, ``profile``, ``claim`` and ``tags`` of each case of a profile, and whether
    it is ``optional``: a real machine with one device is judged without it. The device is as a
    report names it, ``cuda`` or ``simdev:1``; two of that kind are assumed. Raises `SuiteBroken` if
    the suite cannot be collected here."""
    told = ["--collect-only", "-p", __name__, _OPTION, device.partition(":")[0]]
    asked = Options("reference", profile=profile)
    with tempfile.TemporaryDirectory(prefix="portakv-conform-") as folder:
        worker = WorkerProcess(worker_command(), Path(folder, "listing"), asked, told)
        try:
            while events := worker.events(_LIMIT):
                for event in events:
                    if event["event"] == "list":
                        pairs = event["two devices"]
                        cases = event["cases"].items()
                        return {id: {**about, "optional": id in pairs} for id, about in cases}
        finally:
            worker.stop()
        raise SuiteBroken(f"The suite cannot be collected here.\n{worker.printed()}")


class Elsewhere(Facility):
    """The facilities of a kind of device that is not here; good for collecting only."""

    def __init__(self, kind: str) -> None:
        device: Any = SimpleNamespace(type=kind, index=0)  # torch knows no device that is not here
        super().__init__(device, emulated=kind == SIMULATED)

    def devices(self) -> int:
        return 1 if self.device.type == "cpu" else 2

    def spare(self) -> int:
        return 1 << 62

    def synchronize(self) -> None:
        """There is nothing to wait for."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the kind of device."""
    parser.addoption(_OPTION, metavar="KIND", help="list the cases of that kind of device")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Show the suite the device that was asked for, before it looks which cases belong there."""
    suite: Any = config.pluginmanager.get_plugin("portakv-suite")
    suite.facility = Elsewhere(config.getoption(_OPTION))
