# SPDX-License-Identifier: Apache-2.0
"""Copy rows of which a plan has checked that both indices cover them."""

from __future__ import annotations

from portakv.copy.handle import BlockTransfer
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.submit import submit
from portakv.plan.move import Move
from portakv.view import Index, KVView
from portakv.view.index import CONSECUTIVE


def copy_checked(
    src: KVView,
    dst: KVView,
    src_index: Index | None,
    dst_index: Index | None,
    count: int,
    options: CopyOptions = USUAL,
) -> BlockTransfer:
    """Copy ``count`` tokens, as `copy_rows` does, without its checks of arguments and lengths.

    Ids and memory are checked as there. Raises as `copy_rows`, except for lengths.
    """
    src_index = src_index or CONSECUTIVE
    dst_index = dst_index or CONSECUTIVE
    return submit(Move(src, dst, src_index, dst_index, count), options)
