# SPDX-License-Identifier: Apache-2.0
"""Backends: one module for each method of executing a plan. None is imported before it is probed.

This package exports the names that a vendor's backend is written with; `base` describes the
protocol.
"""

from portakv.backends.base import Backend as Backend
from portakv.backends.base import Capabilities as Capabilities
from portakv.backends.base import Decision as Decision
from portakv.backends.base import Launch as Launch
from portakv.backends.base import Pending as Pending
