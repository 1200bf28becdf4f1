# SPDX-License-Identifier: Apache-2.0
"""transformers: caches that are offloaded, and caches over a store.

Importing this package imports no engine: each name is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portakv.integrations import lazy_names

if TYPE_CHECKING:
    from portakv.integrations.transformers.caches import OffloadedCache as OffloadedCache
    from portakv.integrations.transformers.caches import PortaKVLayer as PortaKVLayer
    from portakv.integrations.transformers.caches import cache_argument as cache_argument
    from portakv.integrations.transformers.caches import load_prefix as load_prefix
    from portakv.integrations.transformers.caches import save_prefix as save_prefix
    from portakv.integrations.transformers.store import PrefixStore as PrefixStore

#: The public names, and their modules in this package.
_NAMES = {
    "OffloadedCache": "caches",
    "PortaKVLayer": "caches",
    "PrefixStore": "store",
    "cache_argument": "caches",
    "load_prefix": "caches",
    "save_prefix": "caches",
}
__getattr__ = lazy_names(__name__, _NAMES)
