# SPDX-License-Identifier: Apache-2.0
"""Tensors in a private format of a vendor's, which no backend moves by their strides."""

from __future__ import annotations

from pathlib import Path

import torch

from portakv.backends.reference import Reference
from portakv_conformance.simdev import build

HERE = Path(__file__).parent
why_not = build.missing()


def test_by_default_a_device_s_tensors_hide_nothing() -> None:
    assert Reference.hides(torch.device("cpu")) is None
