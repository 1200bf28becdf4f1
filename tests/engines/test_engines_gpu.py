# SPDX-License-Identifier: Apache-2.0
"""Engines between a CUDA device and the host: every byte, both directions, any layouts."""

from __future__ import annotations

import pytest
import torch
from support.engine_cases import Case, cases, judge

from portakv.engines import pageable as ring
from portakv.engines import slices as schedule
from portakv.engines.pageable import Ring
from portakv.engines.staged import Staged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
CASES = cases()


@pytest.fixture(params=["default", "small"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of the default size, and so small that every copy has many."""
    if request.param == "small":
        monkeypatch.setattr(schedule, "LARGEST", 4096)
        monkeypatch.setattr(schedule, "SMALLEST", 1024)
        monkeypatch.setattr(schedule, "WHOLE", 0)
        monkeypatch.setattr(ring, "SIZES", schedule.Sizes(512, 512, 2048))


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.usefixtures("slices")
def test_staged_moves_every_byte(case: Case, downward: bool) -> None:
    judge(case, Staged(torch.device("cuda", 0)), downward, torch.Tensor.pin_memory)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.usefixtures("slices")
def test_ring_moves_every_byte(case: Case, downward: bool) -> None:
    judge(case, Ring(torch.device("cuda", 0)), downward, torch.Tensor.clone)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.usefixtures("slices")
def test_staged_on_another_stream(downward: bool) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for case in CASES[:6]:
            judge(case, Staged(torch.device("cuda", 0)), downward, torch.Tensor.pin_memory, stream)
