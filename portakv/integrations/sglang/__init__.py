# SPDX-License-Identifier: Apache-2.0
"""SGLang: the platform, its ops, and the storage of HiCache.

Importing this package imports no engine: each name is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portakv.integrations import lazy_names

if TYPE_CHECKING:
    from portakv.integrations.sglang.hicache import PortaKVStorage as PortaKVStorage
    from portakv.integrations.sglang.platform import HostPool as HostPool
    from portakv.integrations.sglang.platform import backup as backup
    from portakv.integrations.sglang.platform import load as load
    from portakv.integrations.sglang.platform import register as register
    from portakv.integrations.sglang.platform import release as release

#: The public names, and their modules in this package.
_NAMES = {
    "HostPool": "platform",
    "PortaKVStorage": "hicache",
    "backup": "platform",
    "load": "platform",
    "register": "platform",
    "release": "platform",
}
__getattr__ = lazy_names(__name__, _NAMES)
