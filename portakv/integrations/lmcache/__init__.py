# SPDX-License-Identifier: Apache-2.0
"""LMCache: ops in its process, and the adapter of its L2.

Importing this package imports no engine: each name is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portakv.integrations import lazy_names

if TYPE_CHECKING:
    from portakv.integrations.lmcache.l2 import PortaKVL2Adapter as PortaKVL2Adapter
    from portakv.integrations.lmcache.platform import CpuSpec as CpuSpec
    from portakv.integrations.lmcache.platform import CudaSpec as CudaSpec
    from portakv.integrations.lmcache.platform import MluSpec as MluSpec
    from portakv.integrations.lmcache.platform import NpuSpec as NpuSpec

#: The public names, and their modules in this package.
_NAMES = {
    "CpuSpec": "platform",
    "CudaSpec": "platform",
    "MluSpec": "platform",
    "NpuSpec": "platform",
    "PortaKVL2Adapter": "l2",
}
__getattr__ = lazy_names(__name__, _NAMES)
