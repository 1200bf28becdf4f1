# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.vllm.tier`."""

from portakv.integrations.vllm.tier import PortaKVTier as PortaKVTier
from portakv.integrations.vllm.tier import PortaKVTieringSpec as PortaKVTieringSpec
