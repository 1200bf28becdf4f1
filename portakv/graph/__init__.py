# SPDX-License-Identifier: Apache-2.0
"""Tasks with priorities and deadlines, which helpers execute for coroutines.

The package uses no files, no networks and no block store.
"""

from portakv.graph.alarms import watch as watch
from portakv.graph.graph import Graph
from portakv.graph.graph import Queue as Queue
from portakv.graph.handle import Handle
from portakv.graph.handle import Missing as Missing
from portakv.graph.prometheus import Collector
from portakv.graph.task import End as End
from portakv.graph.task import Ending as Ending
from portakv.graph.task import Mask as Mask
from portakv.graph.task import Task
from portakv.graph.task import Workers as Workers
from portakv.tasks.limit import SLACK as SLACK
from portakv.tasks.limit import Priority as Priority

__all__ = ["Collector", "Graph", "Handle", "Task"]
