# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin under which a copy on another stream does not wait for the caller's."""

from __future__ import annotations

import torch

from portakv.runtime import streams


def follow_without_waiting(stream: torch.Stream | None, *tensors: torch.Tensor) -> None:
    """Stand for `streams.follow_current` without the line that waits: only the allocator is
    informed."""
    for tensor in tensors:
        if stream is not None and tensor.device == stream.device:
            tensor.record_stream(stream)


def pytest_configure() -> None:
    streams.follow_current = follow_without_waiting
