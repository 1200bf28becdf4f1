# SPDX-License-Identifier: Apache-2.0
"""Whether the judged device still works in this process: after some faults it refuses everything,
and no later case could be judged there."""

from __future__ import annotations

import torch

from portakv_conformance.draw.by_hand import HOMES, Shape, Workshop
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import asked_of, find_home
from portakv_conformance.judge.subject import Subject


class DeviceAlive:
    """Asked after a case that failed on an accelerator: torch's own work there, and a small copy
    through the backend if that has worked before."""

    def __init__(self, subject: Subject, facility: Facility) -> None:
        self._subject, self._facility = subject, facility
        self._copies: bool | None = None

    def learn(self) -> None:
        """A case has passed: find out, once, whether the small copy works."""
        if self._facility.streams and self._copies is None:
            self._copies = self._fault(copies=True) == ""

    def lost(self) -> str:
        """What everything raises since the case that failed just now; empty where all is well."""
        if not self._facility.streams:
            return ""
        copies = self._copies is True
        # An error of the failed case may be delivered by the next call, and only by that one.
        return self._fault(copies=copies) and self._fault(copies=copies)

    def _fault(self, *, copies: bool) -> str:
        try:
            self._facility.synchronize()
            torch.ones(8, device=self._subject.device).cpu()
            if copies:
                home = find_home(self._subject, HOMES)
                case = Workshop(str(self._subject.device), 0, home).gather(Shape(), [1])
                self._subject.copy(*asked_of(case), count=case.count).synchronize()
        except Exception as error:  # a driver's error may be of any kind
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return ""
