# SPDX-License-Identifier: Apache-2.0
"""What `portakv warmup` compiles for: NVIDIA by NVRTC, AMD and Hygon by hipRTC."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from portakv.errors import PortaKVError
from portakv.runtime import _hiprtc
from portakv.runtime import hip as _hip_driver
from portakv.runtime import nvrtc as _nvrtc

#: A compute capability times ten, or what AMD's compiler calls an architecture.
Architecture = int | str


class Target(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        name: ``sm_90``, ``gfx906``.
        compiler: its name and version.
        holds: whether the cache has the binary of a text; compile: makes it and keeps it there.
    """

    name: str
    compiler: str
    holds: Callable[[str], bool]
    compile: Callable[[str], bytes]


def architecture(text: str) -> Architecture:
    """The architecture that a word of the command line names."""
    if re.fullmatch(r"gfx[0-9a-f]{3,4}(:\w+[+-])*", text):
        return text
    if re.fullmatch(r"(sm_)?\d{2,3}|\d{1,2}\.\d", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, expected a number such as 90, or gfx906 or the like"
        )
    return int(text.removeprefix("sm_").replace(".", ""))


def targets(asked: Sequence[Architecture]) -> list[Target]:
    """A target for each architecture; for those of this machine's devices where none is named.

    Raises:
        PortaKVError: a compiler cannot be used, an architecture that it does not know, no device.
    """
    found = list(dict.fromkeys(asked or _own()))
    if not found:
        raise PortaKVError(
            "Kernels were asked for this machine's own devices, but torch finds no CUDA device "
            "here; name architectures, for example --arch 90, or --arch gfx906."
        )
    return [_amd(one) if isinstance(one, str) else _nvidia(one) for one in found]


def _own() -> Iterator[Architecture]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(number)
            yield 10 * major + minor
        else:
            yield torch.cuda.get_device_properties(number).gcnArchName


def _nvidia(capability: int) -> Target:
    why = _nvrtc.missing()
    if why is not None:
        raise PortaKVError(f"The kernels of the cuda backend cannot be compiled: {why}.")
    try:
        name = _nvrtc.target_for(capability)
    except RuntimeError as error:
        raise PortaKVError(str(error)) from error
    return Target(
        name,
        f"NVRTC {_nvrtc.nvrtc_version()}",
        partial(_nvrtc.compiled_before, capability=capability),
        partial(_nvrtc.compile_kernel, capability=capability),
    )


def _amd(name: str) -> Target:
    try:
        driver = _hip_driver.driver()
        compiler = f"hipRTC {_hiprtc.hiprtc_version(driver)}"
    except (_hip_driver.DriverMissing, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise PortaKVError(f"The kernels of the hip backend cannot be compiled: {why}.") from error
    return Target(
        name,
        compiler,
        partial(_hiprtc.compiled_before, driver, architecture=name),
        partial(_hiprtc.compile_kernel, driver, architecture=name),
    )
