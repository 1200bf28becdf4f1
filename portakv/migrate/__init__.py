# SPDX-License-Identifier: Apache-2.0
"""Rows, blocks and weights of other processes, devices and machines: readers pull what owners
offer, in whatever layout and sharding either side has, and commit only rows whose offer is still
valid."""

from importlib import import_module
from typing import Any

from portakv.extras import installing
from portakv.runtime.resources import require_linux

try:
    require_linux("migration between processes")
    import msgspec as msgspec
    import zmq as zmq
except ImportError as error:
    raise ImportError(
        f"Expected msgspec and pyzmq for migration, got: {error}. {installing('migrate')} brings "
        f"them."
    ) from error

from portakv.errors import (
    BackendUnavailable,
    HostMemoryError,
    InvalidTerms,
    LayoutError,
    OfferGone,
    PackOverflow,
    PeerError,
    PortaKVError,
    SlotError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate.channel import Channel
from portakv.migrate.owner import Offer, Owner, Ticket
from portakv.migrate.pull import Pull
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import open_shared, share, shared_empty
from portakv.migrate.transports.distributed import pair, rendezvous, unique_id

__all__ = [
    "BackendUnavailable",
    "Box",
    "Channel",
    "HostMemoryError",
    "InvalidTerms",
    "LayoutError",
    "Offer",
    "OfferGone",
    "Owner",
    "PackOverflow",
    "Parameter",
    "PeerError",
    "PortaKVError",
    "Pull",
    "Reader",
    "Shard",
    "SlotError",
    "Ticket",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "Unsupported",
    "count_weights",
    "open_model",
    "open_shared",
    "pair",
    "prepare_weights",
    "publish",
    "pull_weights",
    "rendezvous",
    "share",
    "share_model",
    "shared_empty",
    "unique_id",
]

#: Names of `portakv.weights`, which builds on this package.
_NAMES = {
    "Box",
    "Parameter",
    "count_weights",
    "open_model",
    "prepare_weights",
    "publish",
    "pull_weights",
    "share_model",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("portakv.weights"), name)
