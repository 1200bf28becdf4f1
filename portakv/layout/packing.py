# SPDX-License-Identifier: Apache-2.0
"""The public path of `PackedPlane`, which `portakv.layout.encodings` has.

Backends import the format of `pack` by this path, too: a result of the conformance suite is valid
for the exact sources of its backend.
"""

from portakv.layout.encodings import (
    COUNTS_AT,
    FLAG_AT,
    OVERFLOW,
    PACK,
    PACKED,
    SEGMENT,
    TOTAL_AT,
    VECTOR,
    PackedPlane,
    sampled,
)

__all__ = [
    "COUNTS_AT",
    "FLAG_AT",
    "OVERFLOW",
    "PACK",
    "PACKED",
    "SEGMENT",
    "TOTAL_AT",
    "VECTOR",
    "PackedPlane",
    "sampled",
]
