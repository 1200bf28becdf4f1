# SPDX-License-Identifier: Apache-2.0
"""The names that other packages may build on: backends, tiers, I/O engines and transports.

A name is public if it is in `portakv.__all__` or `portakv.ext`, or if `docs/api.md` lists it with
its module. A public name keeps its meaning within a minor release. Before a public name or argument
goes, it warns for one minor release and names its replacement. The interfaces of tiers, I/O engines
and transports are provisional: they and their contract suites may change in 0.2.0 without that
warning. All other names are private, and may change at any time.

Each name is loaded at its first use. The names of transports need the extra `migrate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from portakv import (
    BlockTransfer,
    CopyOptions,
    CopyPlan,
    Index,
    InvalidTerms,
    KVView,
    PortaKVError,
    StoreError,
    Transfer,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
    register_backend,
)
from portakv.backends.base import Backend, Capabilities, Decision, Launch, Pending

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer
    from portakv.migrate.messages import Bytes, Count, Message
    from portakv.migrate.transports.base import Lane, Moving, Transport
    from portakv.storage import BlockForm, image, reasons
    from portakv.storage.io.base import Engine, Request
    from portakv.storage.memory import Rows
    from portakv.storage.reasons import Reason, Report
    from portakv.storage.tiers.base import Tier, TierStore
    from portakv.storage.work import Graph, Handle, Queue

__all__ = [
    "Backend",
    "BlockForm",
    "BlockTransfer",
    "Bytes",
    "Capabilities",
    "Channel",
    "CopyOptions",
    "CopyPlan",
    "Count",
    "Decision",
    "Engine",
    "Graph",
    "Handle",
    "Index",
    "InvalidTerms",
    "KVView",
    "Lane",
    "Launch",
    "Message",
    "Moving",
    "Peer",
    "Pending",
    "PortaKVError",
    "Queue",
    "Reason",
    "Report",
    "Request",
    "Rows",
    "StoreError",
    "Tier",
    "TierStore",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "Transport",
    "Unsupported",
    "image",
    "reasons",
    "register_backend",
]

#: The modules of names that a backend does not need.
_LATER = {
    "Graph": "portakv.storage.work",
    "Handle": "portakv.storage.work",
    "Queue": "portakv.storage.work",
    "BlockForm": "portakv.storage.form",
    "Tier": "portakv.storage.tiers.base",
    "TierStore": "portakv.storage.tiers.base",
    "Rows": "portakv.storage.memory",
    "Reason": "portakv.storage.reasons",
    "Report": "portakv.storage.reasons",
    "image": "portakv.storage",
    "reasons": "portakv.storage",
    "Engine": "portakv.storage.io.base",
    "Request": "portakv.storage.io.base",
    "Channel": "portakv.migrate.channel",
    "Peer": "portakv.migrate.channel",
    "Bytes": "portakv.migrate.messages",
    "Count": "portakv.migrate.messages",
    "Message": "portakv.migrate.messages",
    "Lane": "portakv.migrate.transports.base",
    "Moving": "portakv.migrate.transports.base",
    "Transport": "portakv.migrate.transports.base",
}


def __getattr__(name: str) -> object:
    """Load a name at its first use; raise `AttributeError` for a name that is not listed."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LATER[name])
    value: object = getattr(module, name)
    globals()[name] = value
    return value
