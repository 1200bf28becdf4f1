# SPDX-License-Identifier: Apache-2.0
"""Backends: one file for each way of carrying a plan out. None is imported until it is asked.

What a vendor's backend is written with stands here; its contract in `base`.
"""

from portakv.backends.base import Backend as Backend
from portakv.backends.base import Capabilities as Capabilities
from portakv.backends.base import Decision as Decision
from portakv.backends.base import Launch as Launch
from portakv.backends.base import Pending as Pending
