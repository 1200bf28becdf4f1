# SPDX-License-Identifier: Apache-2.0
"""Ids of a caller's for one call, sent to a device by a small copy that waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from portakv.view.index import Index

#: Types of devices to which ids go by a small copy that nobody waits for. To others torch copies
#: them, and the host waits for everything that the stream holds.
AT_ONCE = frozenset({"cuda"})


def bring(indices: Sequence[Index], home: torch.device, dtypes: frozenset[torch.dtype]) -> bool:
    """Send those ids to a device that it has not, all at once, behind what the current stream
    holds; `Index.ids_on` then finds them there.

    Only those of fleeting indices on the host: they are used on no other stream than this one, and
    such as wait for it.

    Returns:
        True where some were sent.
    """
    if home.type not in AT_ONCE or torch.int64 not in dtypes:
        return False
    sent = [
        index for index in dict.fromkeys(indices)
        if index.fleeting and index.on_host and not index.has_ids_on(home, dtypes)
    ]  # fmt: skip
    if not sent:
        return False
    from portakv.host.small import to_device  # not before somebody needs it

    listed = [index.host_ids() for index in sent]
    ids = to_device(listed[0] if len(listed) == 1 else np.concatenate(listed), home, torch.int64)
    for index, own in zip(sent, ids.split([each.size for each in listed]), strict=True):
        index.add_copy(own)
    return True
