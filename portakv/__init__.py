# SPDX-License-Identifier: Apache-2.0
"""Moves KV-cache rows between any two layouts, on any torch device.

One primitive copies rows between two views under index lists; a registry picks the backend, with
its reasons on record.
"""

from __future__ import annotations

from .block_transfer import BlockTransfer
from .blocks import copy_blocks
from .connector import AdaptiveConnector
from .copy import copy_rows
from .errors import (
    BackendUnavailable,
    DeviceMismatch,
    LayoutError,
    PortaKVError,
    SlotError,
    TransferCancelled,
    TransferError,
    Unsupported,
)
from .index import Index
from .plan import CopyPlan
from .presets import PRESETS
from .registry import register_backend
from .transfer import Transfer
from .view import KVView

__version__ = "0.1.0.dev0"

__all__ = [
    "PRESETS",
    "AdaptiveConnector",
    "BackendUnavailable",
    "BlockTransfer",
    "CopyPlan",
    "DeviceMismatch",
    "Index",
    "KVView",
    "LayoutError",
    "PortaKVError",
    "SlotError",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "Unsupported",
    "__version__",
    "copy_blocks",
    "copy_rows",
    "register_backend",
]
