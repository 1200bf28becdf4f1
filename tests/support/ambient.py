# SPDX-License-Identifier: Apache-2.0
"""The settings of torch that an engine may have changed before it calls the library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

State = Callable[[torch.device], AbstractContextManager[object]]


def _set(change: Callable[[Any], object], value: Any, before: Any) -> State:
    """A state that a setter of torch begins and ends."""

    @contextmanager
    def state(device: torch.device) -> Iterator[None]:
        change(device if value == "own" else value)
        try:
            yield
        finally:
            change(before)

    return state


@contextmanager
def _another_current_device(device: torch.device) -> Iterator[None]:
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        pytest.skip("there is one device")
    with torch.get_device_module(device).device(1 - (device.index or 0)):
        yield


@contextmanager
def _warnings_as_errors(device: torch.device) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


STATES: dict[str, State] = {
    "default device meta": _set(torch.set_default_device, "meta", None),
    "default device own": _set(torch.set_default_device, "own", None),
    "with torch.device meta": lambda device: torch.device("meta"),
    "default dtype bfloat16": _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference mode": lambda device: torch.inference_mode(),
    "no grad": lambda device: torch.no_grad(),
    "autocast": lambda device: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": _set(torch.use_deterministic_algorithms, True, False),
    "another current device": _another_current_device,
    "one thread": _set(torch.set_num_threads, 1, torch.get_num_threads()),
    "number of threads": _set(
        torch.set_num_threads, 3 if torch.get_num_threads() != 3 else 2, torch.get_num_threads()
    ),
    "warnings as errors": _warnings_as_errors,
}
