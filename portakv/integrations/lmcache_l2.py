# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.lmcache.l2`."""

from portakv.integrations.lmcache.l2 import PortaKVL2Adapter as PortaKVL2Adapter
