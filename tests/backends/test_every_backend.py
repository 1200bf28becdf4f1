# SPDX-License-Identifier: Apache-2.0
"""What holds of every backend alike, through those that run in this process on a CPU.

`triton` under its interpreter, and `ascend` and `mlu` on the simulated device, are judged by the
same functions in test_triton.py, test_ascend_npu.py and test_mlu_device.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.cuda_on_cpu import CudaOnCpu
from support.each_backend import (
    CHANGES,
    REPEATED,
    SHOWN,
    STATES,
    copied,
    refuses_memory_that_is_elsewhere,
    within,
)

from portakv.backends.base import Backend
from portakv.backends.compiled import Compiled
from portakv.backends.reference import Reference
from portakv_conformance.vendor.ascendc_emulated import AscendC
from portakv_conformance.vendor.hip_emulated import HipEmulated

CPU = torch.device("cpu")
CLASSES: dict[str, type[Backend]] = {
    "reference": Reference,
    "compiled": Compiled,
    "cuda-on-cpu": CudaOnCpu,
    "hip-emulated": HipEmulated,
    "ascendc": AscendC,
}


@pytest.fixture(scope="module", params=CLASSES)
def backend(request: pytest.FixtureRequest) -> Iterator[type[Backend]]:
    """A backend's class, registered under its name if it is not one of the library's own."""
    found = CLASSES[request.param]
    decision = found.probe(CPU)
    if not decision.accepted:
        pytest.skip(decision.reason)
    known: AbstractContextManager[Any] = nullcontext()
    if request.param not in ("reference", "compiled"):
        known = registered(**{found.name: found})
    with known:
        yield found


def some_of_compiled(backend: type[Backend], few: bool, request: pytest.FixtureRequest) -> None:
    """`compiled` compiles a program for each shape: all but a few copies are for ``.ci/full``."""
    if backend is Compiled and not few and "full" not in request.config.option.markexpr:
        pytest.skip("each shape is a program of several seconds: run by -m full")


@pytest.mark.parametrize("name", REPEATED)
def test_sources_of_which_several_rows_are_one(
    name: str, backend: type[Backend], request: pytest.FixtureRequest
) -> None:
    some_of_compiled(backend, name in ("one token for all", "one block for all"), request)
    copied(REPEATED[name](), backend.name)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("state", STATES)
def test_no_state_of_torch_s_changes_a_copy(
    state: str, name: str, backend: type[Backend], request: pytest.FixtureRequest
) -> None:
    few = name == "gather" and state in ("default device meta", "inference mode")
    some_of_compiled(backend, few, request)
    within(state, SHOWN[name](), lambda: backend(CPU))


@pytest.mark.parametrize("change", CHANGES)
def test_memory_that_is_elsewhere_is_refused(change: str, backend: type[Backend]) -> None:
    refuses_memory_that_is_elsewhere(backend.name, CHANGES[change])
