# SPDX-License-Identifier: Apache-2.0
"""PortaKV's storage backend of SGLang on a torch without CUDA, for `portakv conform --tier`."""

from __future__ import annotations

from support import sglang_on_cpu  # noqa: F401

# isort: split
from portakv.integrations.sglang.hicache import PortaKVStorage

__all__ = ["PortaKVStorage"]
