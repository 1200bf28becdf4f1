# SPDX-License-Identifier: Apache-2.0
"""Settings of torch that an engine makes before it calls a library: none of them changes a copy,
and no copy changes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from portakv.registry.registry import SelfCheck, self_check
from portakv_conformance.cases import Bench, Facility, Judge, Shape, Subject
from portakv_conformance.judge.pattern import pattern_bytes

pytestmark = pytest.mark.area("safety")


@contextmanager
def _restored(get: Callable[[], object], set: Callable[..., object], to: object) -> Iterator[None]:
    """Give a global setting of torch another value inside, and restore it afterwards."""
    before = get()
    set(to)
    try:
        yield
    finally:
        set(before)


@contextmanager
def _on_a_stream(device: torch.device) -> Iterator[None]:
    """Make a new stream the current one inside, if the device has streams."""
    facility = Facility(device)
    with ExitStack() as stack:
        if facility.streams:
            stack.enter_context(facility.on(facility.stream()))
        yield


def _settings(device: torch.device) -> dict[str, object]:
    """Return by name the settings of this thread and of torch that a copy must not change."""
    facts: dict[str, object] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "the grad mode": torch.is_grad_enabled(),
        "the inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if Facility(device).streams:
        facts["the current device"] = torch.accelerator.current_device_index()
        facts["the current stream"] = torch.accelerator.current_stream(device)
    return facts


@contextmanager
def _unchanged(device: torch.device) -> Iterator[Callable[[], str]]:
    """Yield a call that compares the settings with those of the beginning.

    The call returns the name of the first setting that differs, else ''. At the end the settings
    that a wrong backend changed are restored.
    """
    before = _settings(device)
    changed = list[str]()

    def compare() -> str:
        for name, now in _settings(device).items():
            if now != before[name]:
                changed.append(f"The copy changed {name} from {before[name]} to {now}.")
        return "".join(changed[:1])

    try:
        yield compare
    finally:
        if changed:
            torch.set_default_dtype(before["torch's default dtype"])  # type: ignore[arg-type]
            torch.set_num_threads(before["the number of threads"])  # type: ignore[arg-type]
            torch.set_grad_enabled(bool(before["the grad mode"]))
            if "the current stream" in before:
                stream: Any = before["the current stream"]
                torch.accelerator.set_stream(stream)


@contextmanager
def _warnings_raise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


#: Each state, entered on the judged device.
_STATES: dict[str, Callable[[torch.device], AbstractContextManager[object]]] = {
    "as-it-is": lambda device: nullcontext(),
    "another-stream": _on_a_stream,
    "three-threads": lambda device: _restored(torch.get_num_threads, torch.set_num_threads, 3),
    "default-device": lambda device: torch.device(device),
    "default-device-cpu": lambda device: torch.device("cpu"),
    "default-device-meta": lambda device: torch.device("meta"),
    "default-dtype": lambda device: _restored(
        torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16
    ),
    "inference-mode": lambda device: torch.inference_mode(),
    "no-grad": lambda device: torch.no_grad(),
    "grad": lambda device: torch.enable_grad(),
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
def test_a_copy_under_a_setting(bench: Bench, direction: str, state: str) -> None:
    """Objects that are made and copied under a setting are the same as without it, and serve later.

    Bytes that are not numbers show if arithmetic moved them.
    """
    shape = Shape(layers=3, heads=3, widths=(48, 48), blocks=90 + list(_STATES).index(state))
    slots = bench.shuffled(shape.slots, 19, 2)

    def judged() -> None:
        case = bench.move(direction, shape, slots)
        for number, guard in enumerate(case.src.guards):
            fresh = pattern_bytes(bench.seed, number, guard.nbytes).copy()
            # each float64 is a signalling NaN
            fresh[7::8] = 0x7F
            fresh[6::8] = 0xF4
            guard.payload().copy_(torch.from_numpy(fresh))

        def carry() -> None:
            with _STATES[state](bench.subject.device):
                bench.judge.finish(bench.judge.start(case))

        bench.judge.judge(case, carry)

    judged()
    bench.copy(bench.move(direction, shape, slots))
    judged()


@pytest.mark.parametrize("state", _STATES)
@pytest.mark.parametrize("carry", ["copy", "launch"])
def test_a_setting_stays_as_it_is(bench: Bench, direction: str, state: str, carry: str) -> None:
    """A copy, and a launch by itself, leave torch's settings and the thread's stream, device and
    modes as they are."""
    shape = Shape(layers=3, widths=(48, 48))
    case = bench.some(direction, shape, 9)
    wrong = list[str]()

    def work() -> None:
        with _STATES[state](bench.subject.device), _unchanged(bench.subject.device) as compare:
            if carry == "copy":
                bench.judge.finish(bench.judge.start(case))
            else:
                bench.judge.launch_only(case)
            wrong.append(compare())

    bench.judge.judge(case, work)
    assert wrong in ([], [""]), wrong[0]


@pytest.mark.parametrize("state", _STATES)
def test_the_self_check_under_a_setting(subject: Subject, judge: Judge, state: str) -> None:
    """The library's self-check, which precedes a backend's first use, does not mind a setting."""
    with _STATES[state](subject.device):
        verdict, why = self_check(subject.backend)
    assert verdict is not SelfCheck.FAILED, f"{why}."
