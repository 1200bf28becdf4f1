# SPDX-License-Identifier: Apache-2.0
"""`fp8` in plain torch: rows to slots and back, on any torch device.

`portakv.layout.encodings` describes the format. The operations are integer arithmetic, and float32
arithmetic whose operands and results are normal numbers or zero: neither the device nor a mode that
flushes subnormal numbers changes a byte.
"""

from __future__ import annotations

import torch

from portakv.layout.encodings import (
    E4M3_LARGEST,
    E4M3_LEAST_NORMAL,
    E4M3_NAN,
    E4M3_STEP,
    FP8_LEAST_SCALE,
    FP8_LEAST_VALUE,
    Fp8Plane,
)

#: float32 has 23 bits of mantissa and the exponent bias 127, e4m3 has 3 bits and the bias 7.
_DROPPED = 20
_BIAS = (127 - 7) << 3


def encode_rows(rows: torch.Tensor, slots: torch.Tensor, plane: Fp8Plane) -> None:
    """Write the slots of planes.

    Args:
        rows: ``[planes, tokens, dim]`` of a floating type of 16 or 32 bits.
        slots: uint8 ``[planes, slot_bytes]``; all bytes are written.
    """
    values = rows.to(torch.float32)
    magnitudes = values.abs()
    finite = magnitudes < torch.inf  # False for NaN as well
    magnitudes = torch.where(finite & (magnitudes >= FP8_LEAST_VALUE), magnitudes, 0.0)
    scales = scales_of(magnitudes.amax(2))
    magnitudes = (magnitudes / scales[:, :, None]).clamp_(max=E4M3_LARGEST)
    codes = nearest(magnitudes) | torch.signbit(values).to(torch.int32) << 7
    codes = torch.where(finite, codes, E4M3_NAN)

    slots[:, : plane.values] = codes.to(torch.uint8).flatten(1)
    bits = scales.view(torch.int32) >> 16
    area = slots[:, plane.values : plane.scales_past].view(-1, plane.tokens, 2)
    area[:, :, 0] = (bits & 0xFF).to(torch.uint8)
    area[:, :, 1] = (bits >> 8).to(torch.uint8)
    slots[:, plane.scales_past :] = 0


def decode_rows(slots: torch.Tensor, rows: torch.Tensor, plane: Fp8Plane) -> None:
    """Write the rows of planes from their slots; arguments as for `encode_rows`.

    A finite value that a scale takes past the range of the rows' type becomes its largest number.
    """
    codes = slots[:, : plane.values].to(torch.int32).view(-1, plane.tokens, plane.dim)
    places = codes & 0x7F
    normal = ((places + _BIAS) << _DROPPED).view(torch.float32)
    magnitudes = torch.where(places < 8, places.to(torch.float32) * E4M3_STEP, normal)
    values = torch.where(codes > 0x7F, -magnitudes, magnitudes)

    area = slots[:, plane.values : plane.scales_past].to(torch.int32).view(-1, plane.tokens, 2)
    scales = ((area[:, :, 0] | area[:, :, 1] << 8) << 16).view(torch.float32)
    most = torch.finfo(rows.dtype).max
    values = (values * scales[:, :, None]).clamp_(-most, most)
    # Devices convert a NaN to different bits: it is written as a constant of the rows' type.
    rows.copy_(values).masked_fill_(places == E4M3_NAN, torch.nan)


def scales_of(largest: torch.Tensor) -> torch.Tensor:
    """Return for each token the least bf16 number, as float32, that brings its largest magnitude to
    at most 448."""
    # By a tensor: CUDA multiplies by the rounded reciprocal of a number.
    quotients = largest / torch.full_like(largest, E4M3_LARGEST)
    bits = quotients.clamp_(min=FP8_LEAST_SCALE).view(torch.int32)
    return (bits + 0xFFFF & ~0xFFFF).view(torch.float32)


def nearest(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the codes of the e4m3 numbers nearest to magnitudes from 0 to 448, ties to even."""
    bits = magnitudes.view(torch.int32)
    half = (1 << _DROPPED - 1) - 1
    normal = (bits + half + (bits >> _DROPPED & 1) >> _DROPPED) - _BIAS
    small = torch.round(magnitudes * (1 / E4M3_STEP)).to(torch.int32)
    return torch.where(magnitudes < E4M3_LEAST_NORMAL, small, normal)
