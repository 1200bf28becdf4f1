# SPDX-License-Identifier: Apache-2.0
"""A simulated accelerator: two devices with streams and memory of their own, run on the CPU.

It shows that code assumes nothing about CUDA, and it turns a missing wait into wrong bytes every
time. Device memory cannot be touched by the host. Work runs late, in worker threads, and only when
somebody waits for it; among all orders that streams and events allow it takes the one that is worst
for whoever forgot to wait. It proves nothing about any vendor's kernels, and nothing about speed.

One C++ library, built on demand with the machine's compiler (about 10 s) and kept on disk.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import backend_registration

from portakv_conformance.simdev.build import SimulatedDeviceError, load_library, missing

__all__ = [
    "EMULATED",
    "NAMES",
    "SimulatedDeviceError",
    "available",
    "copy_runs",
    "counted",
    "delay",
    "early",
    "load",
    "loaded",
    "synchronised",
    "take_faults",
]

#: What it always says of itself.
EMULATED = True
#: The names that it can carry, one in a process.
NAMES = ("simdev", "npu", "mlu")

_FREE = "privateuseone"  # torch's name for the device type while it is free
_lock = threading.Lock()
_name: str | None = None


def available() -> str | None:
    """Return None if the device can be loaded, as far as is known without trying; else why not."""
    return None if _name is not None else _taken() or missing()


def loaded() -> str | None:
    """Return the name of the device in this process; None if it was not loaded."""
    return _name


def load(name: str = "simdev") -> None:
    """Make the device known to torch as ``name``; build it if it is not built. A second call does
    nothing.

    Afterwards ``torch.device("simdev:1")``, ``torch.simdev``, ``torch.Stream("simdev")``,
    ``torch.Event`` and ``torch.accelerator`` work.

    Raises:
        ValueError: a name that it cannot carry.
        SimulatedDeviceError: no compiler, or it failed; another name was loaded; or another
            package has torch's place for devices in this process.
    """
    global _name
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise ValueError(f"Expected a name for the simulated device, got {name!r}. Pass {known}.")
    with _lock:
        if _name == name:
            return
        if _name is not None:
            raise SimulatedDeviceError(
                f"Expected the name {_name!r}, which the simulated device has in this process, got "
                f"{name!r}. Start another process for {name!r}: torch takes one name."
            )
        if why := _taken():
            raise SimulatedDeviceError(why)
        load_library()
        from portakv_conformance.simdev import device_module

        torch.ops.portakv_simdev.power_on()
        backend_registration.rename_privateuse1_backend(name)
        torch._register_device_module(name, device_module)
        backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
        atexit.register(_tell)
        _name = name


def delay(stream: torch.Stream, milliseconds: int) -> None:
    """Keep a stream busy for some time once its work runs."""
    torch.ops.portakv_simdev.delay(stream.device_index, stream.stream_id, milliseconds)


def copy_runs(
    src: torch.Tensor, dst: torch.Tensor, nbytes: torch.Tensor, stream: torch.Stream | None = None
) -> None:
    """Copy ``nbytes[i]`` bytes from address ``src[i]`` to ``dst[i]``, as one job on a stream.

    A vendor's batched memory copy looks like this.

    Args:
        src, dst, nbytes: int64 ``[runs]`` on the host; read before the call returns. Addresses of
            the stream's device or of pinned memory.
        stream: where to order the job; None: the current stream of the current device.

    Raises:
        ValueError: other dtypes, shapes or places of the lists.
        RuntimeError: a run that lies in no allocation, or in another device's; nothing was copied.
    """
    for supplied in (src, dst, nbytes):
        if supplied.dtype != torch.int64 or supplied.dim() != 1 or not supplied.is_cpu:
            raise ValueError(
                f"Expected each list of copy_runs to be int64, with one dimension, on the host, "
                f"got {supplied.dtype}, shape {tuple(supplied.shape)}, on {supplied.device}."
            )
    if not src.numel() == dst.numel() == nbytes.numel():
        raise ValueError(
            f"Expected lists of equal length for copy_runs, got {src.numel()} sources, "
            f"{dst.numel()} destinations and {nbytes.numel()} sizes."
        )
    where = torch.accelerator.current_stream() if stream is None else stream
    lists = (src.contiguous(), dst.contiguous(), nbytes.contiguous())
    torch.ops.portakv_simdev.copy_runs(*lists, where.device_index, where.stream_id)


def take_faults() -> list[str]:
    """Return the failures of jobs since the last call, a sentence each; the host's waits raise
    them."""
    return [] if _name is None else list(torch.ops.portakv_simdev.taken_faults())


def synchronised() -> list[str]:
    """Return the operators that had to wait for the device, since their shapes depend on values."""
    return [] if _name is None else list(torch.ops.portakv_simdev.waited())


def counted() -> tuple[int, int]:
    """Return how many operators and copies were launched so far, and how often a host waited: by
    any thread, on any device. Views are not launched."""
    launches, waits = torch.ops.portakv_simdev.counted()
    return launches, waits


@contextmanager
def early() -> Iterator[None]:
    """Run each job of a block before its launch returns: the other extreme of what is allowed."""
    torch.ops.portakv_simdev.run_early(True)
    try:
        yield
    finally:
        torch.ops.portakv_simdev.run_early(False)


def _taken() -> str | None:
    holder = torch._C._get_privateuse1_backend_name()
    if holder == _FREE:
        return None
    return (
        f"Another package has made {holder!r} torch's device in this process, and there is room "
        f"for one; start a process without it (TORCH_DEVICE_BACKEND_AUTOLOAD=0)."
    )


def _tell() -> None:
    for fault in take_faults():
        print(fault, file=sys.stderr)
