# SPDX-License-Identifier: Apache-2.0
"""Rows, blocks and weights of other processes, devices and machines: readers pull what owners
offer, in whatever layout and sharding either side has, and commit only rows whose offer is still
valid."""

from portakv.extras import installing
from portakv.runtime.linux import require_linux

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
from portakv.migrate.ipc import open_shared, share, shared_empty
from portakv.migrate.models import open_model, share_model
from portakv.migrate.offers import Offer, Owner
from portakv.migrate.parameters import Box, Parameter
from portakv.migrate.pull import Pull
from portakv.migrate.reader import Reader
from portakv.migrate.rendezvous import pair, rendezvous, unique_id
from portakv.migrate.shards import Shard
from portakv.migrate.tickets import Ticket
from portakv.migrate.weights import count_weights, prepare_weights, publish, pull_weights

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
