# SPDX-License-Identifier: Apache-2.0
"""Blocks of a KV cache outside of the device: on the host, on disks, in object stores."""

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    PortaKVError,
    SlotError,
    StoreBusy,
    StoreError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.storage.calls import AutoEncoding
from portakv.storage.form import BlockForm
from portakv.storage.keys import prefix_keys
from portakv.storage.store import BlockStore
from portakv.storage.tiers.disk import Disk
from portakv.storage.tiers.remote import Remote

__all__ = [
    "AutoEncoding",
    "BlockForm",
    "BlockStore",
    "Disk",
    "InvalidTerms",
    "LayoutError",
    "PortaKVError",
    "Remote",
    "SlotError",
    "StoreBusy",
    "StoreError",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "Unsupported",
    "prefix_keys",
]
