# SPDX-License-Identifier: Apache-2.0
"""The text and the arguments of the small copies' kernels, whatever compiles and launches them."""

from __future__ import annotations

import struct
from bisect import bisect_left
from functools import cache
from importlib.resources import files

THREADS = 128
#: Blocks of one launch: so many vectors are in flight that the link is busy, and no more.
MOST_BLOCKS = 32

# Parameters of a launch in bytes: 4 KB everywhere; 32,764 from CUDA 12.1 (driver R530) and compute
# capability 7.0 on (CUDA C++ Programming Guide, "__grid_constant__" and "Kernel parameters").
CLASSIC_PARAMETERS = 4096
LARGE_PARAMETERS = 32764
_LARGE_DRIVER, _LARGE_CAPABILITY = 12010, 70

VALUES_HEAD = struct.Struct("=QII")  # to, bytes, width
MAPPED = struct.Struct("=QQQQ")  # to, from, bytes, width
MAPPED_NAME = "portakv_small_mapped"
_WIDE = 16


def room_for_values(parameters: int) -> int:
    """Bytes of values that a launch with so many bytes of parameters carries."""
    return (parameters - VALUES_HEAD.size) // _WIDE * _WIDE


#: Bytes that one launch carries by value: a kernel for each, since the driver copies them all.
CAPACITIES = (
    *(256, 512, 1024, 2048, room_for_values(CLASSIC_PARAMETERS)),
    *(8192, 16384, room_for_values(LARGE_PARAMETERS)),
)


def parameter_limit(driver: int, capability: int) -> int:
    """Bytes of parameters that a launch may have.

    Args:
        driver: CUDA's version that the driver supports; 12010 is 12.1.
        capability: the device's compute capability; 90 is 9.0.
    """
    large = driver >= _LARGE_DRIVER and capability >= _LARGE_CAPABILITY
    return LARGE_PARAMETERS if large else CLASSIC_PARAMETERS


def capacities(limit: int) -> tuple[int, ...]:
    """The kernels by value that a parameter limit allows, smallest first."""
    return tuple(one for one in CAPACITIES if VALUES_HEAD.size + one <= limit)


def capacity_for(nbytes: int) -> int:
    """The smallest kernel that carries so many bytes by value, which one of them must."""
    return CAPACITIES[bisect_left(CAPACITIES, nbytes)]


def values_name(capacity: int) -> str:
    """The entry that carries so many bytes by value."""
    return f"portakv_small_{capacity}"


@cache
def source(limit: int) -> str:
    """The whole text that is compiled for a parameter limit."""
    text = files("portakv_native.cuda").joinpath("small.cuh").read_text()
    entries = [
        f'extern "C" __global__ void {values_name(one)}(\n'
        f"    PORTAKV_CONSTANT const portakv::small::Values<{one // _WIDE}> values) {{\n"
        f"    portakv::small::write_values(values);\n}}\n"
        for one in capacities(limit)
    ]
    entries.append(
        f'extern "C" __global__ void {MAPPED_NAME}(\n'
        f"    PORTAKV_CONSTANT const portakv::small::Mapped mapped) {{\n"
        f"    portakv::small::write_mapped(mapped);\n}}\n"
    )
    return text + "\n" + "".join(entries)


def width(address: int) -> int:
    """The widest vector in bytes that an address is aligned to."""
    return min(_WIDE, address & -address)


def blocks(nbytes: int, vector: int) -> int:
    """Thread blocks of a launch."""
    return max(1, min(MOST_BLOCKS, -(-nbytes // (vector * THREADS))))
