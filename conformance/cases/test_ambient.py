# SPDX-License-Identifier: Apache-2.0
"""Settings of torch that an engine makes before it calls a library: none of them changes a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from portakv.registry.self_check import SelfCheck, self_check
from portakv_conformance.cases import Bench, Judge, Shape, Subject
from portakv_conformance.judge.pattern import pattern_bytes

pytestmark = pytest.mark.area("safety")


@contextmanager
def _restored(get: Callable[[], object], set: Callable[..., object], to: object) -> Iterator[None]:
    """Inside, a global setting of torch has another value."""
    before = get()
    set(to)
    try:
        yield
    finally:
        set(before)


@contextmanager
def _warnings_raise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


#: Each state, entered on the judged device.
_STATES: dict[str, Callable[[torch.device], AbstractContextManager[object]]] = {
    "default-device": lambda device: torch.device(device),
    "default-device-cpu": lambda device: torch.device("cpu"),
    "default-device-meta": lambda device: torch.device("meta"),
    "default-dtype": lambda device: _restored(
        torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16
    ),
    "inference-mode": lambda device: torch.inference_mode(),
    "no-grad": lambda device: torch.no_grad(),
    "autocast": lambda device: torch.autocast(
        device.type if device.type in ("cpu", "cuda") else "cpu", dtype=torch.bfloat16
    ),
    "deterministic": lambda device: _restored(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "one-thread": lambda device: _restored(torch.get_num_threads, torch.set_num_threads, 1),
    "warnings-raise": lambda device: _warnings_raise(),
}


@pytest.mark.parametrize("state", _STATES)
def test_a_copy_under_a_setting(home: Bench, direction: str, state: str) -> None:
    """What is made and copied under a setting is what it is at any other time, and serves then.
    Bytes that are no numbers show if they were moved by arithmetic."""
    shape = Shape(layers=3, heads=3, widths=(48, 48), blocks=90 + list(_STATES).index(state))
    slots = home.shuffled(shape.slots, 19, 2)

    def judged() -> None:
        case = home.move(direction, shape, slots)
        for number, guard in enumerate(case.src.guards):
            fresh = pattern_bytes(home.seed, number, guard.nbytes).copy()
            fresh[7::8], fresh[6::8] = 0x7F, 0xF4  # each float64 is a signalling NaN
            guard.payload().copy_(torch.from_numpy(fresh))

        def carry() -> None:
            with _STATES[state](home.subject.device):
                home.judge.finish(home.judge.start(case))

        home.judge.judge(case, carry)

    judged()
    home.copy(home.move(direction, shape, slots))
    judged()


@pytest.mark.parametrize("state", _STATES)
def test_the_self_check_under_a_setting(subject: Subject, judge: Judge, state: str) -> None:
    """The library's self-check, which precedes a backend's first use, does not mind a setting."""
    with _STATES[state](subject.device):
        found, why = self_check(subject.backend)
    assert found is not SelfCheck.FAILED, f"{why}."
