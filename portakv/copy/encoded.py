# SPDX-License-Identifier: Apache-2.0
"""Copies of which a side is encoded, by the encoding."""

from __future__ import annotations

from portakv.copy.call import Passed, Submit
from portakv.copy.fp8 import copy_fp8
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.packing import copy_packed
from portakv.layout.encodings import FP8
from portakv.plan.move import Move


def copy_encoded(
    move: Move,
    options: CopyOptions,
    began: float,
    submit: Submit,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of which a side is encoded; raise as `copy_packed` and `copy_fp8`.

    ``passed``: the checks that the copy passed just now, as a part. None: check it.
    """
    src = move.src.form.encoding
    dst = move.dst.form.encoding
    encoding = src or dst
    if bool(src) != bool(dst) and encoding[0].encoding == FP8:
        return copy_fp8(move, options, began, submit)
    return copy_packed(move, options, began, submit, passed)
