# SPDX-License-Identifier: Apache-2.0
"""Figures for operators: traces, metrics and alarms of stores, channels and weights.

The package uses no files, no networks and no block store.
"""

from portakv.graph.alarms import watch as watch
from portakv.graph.meter import Collector

__all__ = ["Collector"]
