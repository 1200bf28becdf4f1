# SPDX-License-Identifier: Apache-2.0
"""The table of candidates: the backends that PortaKV brings, in the order in which they are asked.

Nowhere else does the library know a vendor's name.
"""

from __future__ import annotations

BUILT_IN = {
    "cuda": "portakv.backends.cuda:Cuda",
    "hip": "portakv.backends.hip:Hip",
    "ascend": "portakv.backends.ascend:Ascend",
    "mlu": "portakv.backends.mlu:Mlu",
    "triton": "portakv.backends.triton:Triton",
    "host": "portakv.engines.choose:Host",
    "staged": "portakv.engines.staged:Staged",
    "descriptors": "portakv.engines.descriptors:Descriptors",
    "direct": "portakv.engines.direct:Direct",
    "ring": "portakv.engines.pageable:Ring",
    "compiled": "portakv.backends.compiled:Compiled",
    "reference": "portakv.backends.reference:Reference",
}
#: Engines: between a device and the host only, for whichever backend serves the device. The first
#: one chooses among the others.
ENGINES = ("host", "staged", "descriptors", "direct", "ring")
#: What comes last whatever the device: they run everywhere, and never faster than a native one.
LAST = ("compiled", "reference")
#: By device type, what is used only when asked for: on a CPU it gains less than compiling costs.
ONLY_ASKED = {"cpu": ("compiled",)}
#: The one type of device that a candidate is made for; the others run on several.
MADE_FOR = {"cuda": "cuda", "hip": "cuda", "ascend": "npu", "mlu": "mlu"}
