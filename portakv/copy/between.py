# SPDX-License-Identifier: Apache-2.0
"""Choose what executes a copy between two places, and order a copy between two devices."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from portakv.copy.context import Context
from portakv.errors import DeviceMismatch, Unsupported
from portakv.interconnect.choose import across
from portakv.interconnect.peer import reached
from portakv.interconnect.strategy import Strategy, Terms
from portakv.registry.registry import Choice
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.transfer import Transfer
from portakv.view.view import KVView


def common_device(src: KVView, dst: KVView) -> torch.device:
    """Return the device that executes a copy: the accelerator if one side is on it."""
    if src.device == dst.device or dst.device.type == "cpu":
        return src.device
    if src.device.type == "cpu":
        return dst.device
    raise DeviceMismatch(
        f"Expected a copy on one device, between it and the host, or between two devices of one "
        f"type, got {src.device} as source and {dst.device} as destination. Go through a host "
        f"buffer."
    )


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: once, instead of a query about every device that is not."""
    apart = torch.accelerator.current_device_index() != device.index
    return inside(device if apart else None)


def seen_by_reader(src: KVView, context: Context) -> KVView:
    """Return rows of another device, to be read on the context's device and stream.

    The stream waits for the present work of the current stream of the rows' device.

    Raises:
        DeviceMismatch: devices of two types.
        Unsupported: in graph capture.
    """
    reader, stream, captured = context
    peer = src.as_peer(reader)
    owner = src.memory_device
    if captured or capturing(owner):
        why = (
            f"a graph would have to hold the streams of {owner} and {reader}; make the copy outside"
        )
        raise refuse_capture("A copy between two devices", why)
    work = stream or torch.accelerator.current_stream(reader.index)
    work.wait_stream(torch.accelerator.current_stream(owner.index))
    return peer


def order_after(src: KVView, made: Transfer) -> None:
    """Make the current stream of the source's device wait for a copy of it.

    So nothing overwrites the source too early; `Tensor.copy_` orders both devices the same way.
    """
    for last in made.completions[-1:]:  # of several layers, which end in order
        last.wait(torch.accelerator.current_stream(src.memory_device.index))


def executor_of(src: KVView, dst: KVView, choice: Choice, terms: Terms | None) -> Choice:
    """Return what executes a copy on a caller's terms.

    That is the chosen backend if it reaches both places, else a transfer strategy. A worker keeps
    the rate. A copy asks once: whatever it is cut into has the same executor.

    Raises:
        DeviceMismatch: a view lies on a device that has no part in the copy.
        Unsupported: nothing here keeps the terms.
    """
    own_device = choice.backend.device
    devices = {src.device, dst.device}
    if devices - {own_device, torch.device("cpu")} or own_device not in devices:
        raise DeviceMismatch(
            f"Expected a source and a destination on {own_device}, which runs the copy, or on the "
            f"host, got a source on {src.device} and a destination on {dst.device}. Make a "
            f"connector for their device."
        )
    if src.form.place == "peer":
        return reached(src, choice, terms or Terms())
    if isinstance(choice.backend, Strategy):
        return choice if terms is None else across(choice, terms)
    if src.device != dst.device and (src.form.place, dst.form.place) not in choice.can.places:
        return across(choice, terms)
    if terms is not None and terms.max_thread_blocks is not None:
        raise Unsupported(
            f"Expected no max_thread_blocks for a copy from {src.device} to {dst.device} by "
            f"{choice.name!r}, got max_thread_blocks={terms.max_thread_blocks}",
            "only kernels that read or write host memory keep the limit. Leave it out",
        )
    return choice
