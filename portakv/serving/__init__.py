# SPDX-License-Identifier: Apache-2.0
"""What stands between a serving engine and the stores: plans for its workers, reports from them.

And the server of a host, whose store serves the processes of several engines.
"""

from portakv.extras import installing

try:
    import msgspec as msgspec
    import zmq as zmq
except ImportError as error:
    raise ImportError(
        f"Expected msgspec and pyzmq for serving, got: {error}. {installing('serving')} "
        f"brings them."
    ) from error

from portakv.serving.groups import Group, Validity
from portakv.serving.local import StoreTerms
from portakv.serving.pages import PageJob, Pages, PageSize, PageStore, Usage, page_key
from portakv.serving.plan import Job, Plan, Report
from portakv.serving.scheduler import (
    BlockHolder,
    Costs,
    Described,
    Index,
    SchedulerSide,
    measured,
)
from portakv.serving.server.client import ServerBlocks, ServerIndex, ServerTransfer, StoreClient
from portakv.serving.server.link import Place
from portakv.serving.server.server import StoreServer, place_of
from portakv.serving.worker import Blocks, Ended, GroupCache, WorkerSide

__all__ = [
    "BlockHolder",
    "Blocks",
    "Costs",
    "Described",
    "Ended",
    "Group",
    "GroupCache",
    "Index",
    "Job",
    "PageJob",
    "PageSize",
    "PageStore",
    "Pages",
    "Place",
    "Plan",
    "Report",
    "SchedulerSide",
    "ServerBlocks",
    "ServerIndex",
    "ServerTransfer",
    "StoreClient",
    "StoreServer",
    "StoreTerms",
    "Usage",
    "Validity",
    "WorkerSide",
    "measured",
    "page_key",
    "place_of",
]
