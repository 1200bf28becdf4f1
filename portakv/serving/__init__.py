# SPDX-License-Identifier: Apache-2.0
"""What stands between a serving engine and the stores: plans for its workers, reports from them."""

from portakv.serving.costs import Costs, measured
from portakv.serving.hand import Ended, GroupCache, Hand
from portakv.serving.ledger import BlockHolder, Described, Group, Index, Ledger, check_group
from portakv.serving.plan import Job, Plan, Report

__all__ = [
    "BlockHolder",
    "Costs",
    "Described",
    "Ended",
    "Group",
    "GroupCache",
    "Hand",
    "Index",
    "Job",
    "Ledger",
    "Plan",
    "Report",
    "check_group",
    "measured",
]
