# SPDX-License-Identifier: Apache-2.0
"""A process that pins host memory before it has used its device in any way."""

from __future__ import annotations

import torch

from portakv import KVView
from portakv.host import pinned

rows = pinned.empty((2, 4, 16), torch.int32)
place = KVView(rows, "layer token dim").form.place
print(pinned.why_not() is None, rows.is_pinned(), place)
