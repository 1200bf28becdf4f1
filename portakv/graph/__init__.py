# SPDX-License-Identifier: Apache-2.0
"""Work with dependencies, priorities and deadlines, carried out by the workers of links. Knows
neither files nor networks, and needs no store."""

from portakv.graph.graph import Graph, Lease, Node
from portakv.graph.handle import Handle
from portakv.graph.prometheus import Collector

__all__ = ["Collector", "Graph", "Handle", "Lease", "Node"]
