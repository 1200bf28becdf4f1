# SPDX-License-Identifier: Apache-2.0
"""Moves KV-cache rows between any two layouts, on any torch device.

One primitive copies rows between two views under index lists; a registry picks the backend, with
its reasons on record.
"""

from __future__ import annotations

from portakv.connector.connector import AdaptiveConnector
from portakv.copy.choose_encoding import EncodingChoice, choose_encoding
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.copy.rotation import rotate_blocks
from portakv.copy.rows import copy_blocks, copy_rows, copy_runs
from portakv.errors import (
    BackendUnavailable,
    DeviceMismatch,
    HostMemoryError,
    InvalidTerms,
    LayoutError,
    OfferGone,
    PackOverflow,
    PeerError,
    PoolExhausted,
    PortaKVError,
    SlotError,
    StoreBusy,
    StoreError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.layout.encodings import Fp8, Pack, Rope
from portakv.layout.presets import PRESETS
from portakv.plan.plan import CopyPlan
from portakv.registry.registry import register_backend
from portakv.runtime.transfer import LateErrors, Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AdaptiveConnector",
    "BackendUnavailable",
    "BlockTransfer",
    "CopyOptions",
    "CopyPlan",
    "DeviceMismatch",
    "EncodingChoice",
    "Fp8",
    "HostMemoryError",
    "Index",
    "InvalidTerms",
    "KVView",
    "LateErrors",
    "LayoutError",
    "OfferGone",
    "Pack",
    "PackOverflow",
    "PeerError",
    "PoolExhausted",
    "PortaKVError",
    "Rope",
    "SlotError",
    "StoreBusy",
    "StoreError",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "Unsupported",
    "__version__",
    "choose_encoding",
    "copy_blocks",
    "copy_rows",
    "copy_runs",
    "register_backend",
    "rotate_blocks",
]
