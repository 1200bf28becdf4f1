# SPDX-License-Identifier: Apache-2.0
"""A HIP device as torch shows it: under the name ``cuda``, with an architecture of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from portakv.runtime._launching import raw_stream

# Architectures that only Hygon makes; its Z100 is a gfx906, as some of AMD's devices are.
_HYGON = frozenset({"gfx926", "gfx928", "gfx936", "gfx938"})
_HYGON_NAMES = ("hygon", "dcu", "z100", "k100", "k500", "bw1000", "bw500")


class Card:
    """One device. Torch is asked for its facts when it is made.

    Attributes:
        device: as torch names it.
        architecture: what hipRTC compiles for, such as ``gfx90a:sramecc+:xnack-``.
        name: the model's name.

    Raises:
        RuntimeError: torch does not tell the architecture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name, self.architecture = self._facts()
        if not self.architecture.startswith("gfx"):
            raise RuntimeError(
                f"torch tells no architecture of {device} ({self.architecture!r} was found, and "
                f"gfx906 or the like expected); use a newer torch for ROCm"
            )

    def _facts(self) -> tuple[str, str]:
        told = torch.cuda.get_device_properties(self.device)
        return str(told.name), str(getattr(told, "gcnArchName", ""))

    @property
    def hygon(self) -> bool:
        """Whether it is a DCU of Hygon."""
        named = any(word in self.name.lower() for word in _HYGON_NAMES)
        return named or self.architecture.partition(":")[0] in _HYGON

    def __str__(self) -> str:
        maker = ", a Hygon DCU" if self.hygon else ""
        return f"{self.architecture.partition(':')[0]} ({self.name or 'unnamed'}{maker})"

    def is_current(self) -> bool:
        """Whether it is this thread's current device."""
        return bool(torch._C._cuda_getDevice() == self.device.index)

    def current(self) -> AbstractContextManager[object]:
        """Inside, it is this thread's current device."""
        return torch.cuda.device(self.device)

    def stream(self, stream: torch.Stream | None) -> int:
        """The driver's handle of a stream; None: of its current one."""
        if stream is None:
            return int(torch._C._cuda_getCurrentRawStream(self.device.index))
        return raw_stream(stream)

    def capturing(self) -> bool:
        """Whether its current stream is captured into a graph."""
        with self.current():
            return torch.cuda.is_current_stream_capturing()
