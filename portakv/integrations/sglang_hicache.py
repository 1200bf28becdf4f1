# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.sglang.hicache`."""

from portakv.integrations.sglang.hicache import PortaKVStorage as PortaKVStorage
