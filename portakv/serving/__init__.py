# SPDX-License-Identifier: Apache-2.0
"""What stands between a serving engine and the stores: plans for its workers, reports from them.

And the keeper of a host, whose store serves the processes of several engines.
"""

from portakv.extras import installing

try:
    import msgspec as msgspec
    import xxhash as xxhash
    import zmq as zmq
except ImportError as error:
    raise ImportError(
        f"Expected xxhash, msgspec and pyzmq for serving, got: {error}. {installing('serving')} "
        f"brings them."
    ) from error

from portakv.serving.costs import Costs, measured
from portakv.serving.hand import Blocks, Ended, GroupCache, Hand
from portakv.serving.keeper_blocks import KeptBlocks
from portakv.serving.keeper_client import KeeperClient
from portakv.serving.keeper_server import Keeper, place_of
from portakv.serving.keeper_transfer import KeptTransfer
from portakv.serving.known import KeeperIndex
from portakv.serving.ledger import BlockHolder, Described, Group, Index, Ledger, check_group
from portakv.serving.local import StoreTerms
from portakv.serving.pages import PageJob, Pages, PageSize, PageStore, Usage, page_key
from portakv.serving.place import Place
from portakv.serving.plan import Job, Plan, Report

__all__ = [
    "BlockHolder",
    "Blocks",
    "Costs",
    "Described",
    "Ended",
    "Group",
    "GroupCache",
    "Hand",
    "Index",
    "Job",
    "Keeper",
    "KeeperClient",
    "KeeperIndex",
    "KeptBlocks",
    "KeptTransfer",
    "Ledger",
    "PageJob",
    "PageSize",
    "PageStore",
    "Pages",
    "Place",
    "Plan",
    "Report",
    "StoreTerms",
    "Usage",
    "check_group",
    "measured",
    "page_key",
    "place_of",
]
