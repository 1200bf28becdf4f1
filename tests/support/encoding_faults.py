# SPDX-License-Identifier: Apache-2.0
"""Cases of the suite that a fault of a conversion must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from portakv_conformance.cases import Bench
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge
from portakv_conformance.judge.subject import subject


def failing_case(cases: Mapping[str, Callable[[Bench], None]], backend: str = "reference") -> str:
    """Return the first case that a backend fails; empty if it passes them all."""
    judged = subject(backend, "cpu")
    bench = Bench("cpu", 5, judge=Judge(judged, Facility(torch.device("cpu")), 5))
    for name, case in cases.items():
        try:
            case(bench)
        except AssertionError:
            return name
    assert not bench.judge.declined
    return ""
