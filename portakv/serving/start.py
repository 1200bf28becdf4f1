# SPDX-License-Identifier: Apache-2.0
"""Copies before an engine's first step, so that its first save and load stall no step."""

from __future__ import annotations

import logging
from math import lcm
from secrets import token_bytes

from portakv.errors import PortaKVError
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.rehearsal import rehearse as rehearse
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore
from portakv.view import KVView

_log = RateLimitedLog(logging.getLogger(__name__))
#: Bytes of the long copy: more than those that a kernel moves by itself while a model runs.
LONG = 65 << 20


def warm_up(view: KVView, form: BlockForm, by_layer: bool = False) -> None:
    """Save blocks of a view, one and many, and load them again, by a store that is closed then.

    Kernels are built or read from disk, which takes up to a second for the first copy of a process.
    The view keeps its bytes. If the store cannot be opened or fails, the log has a line, and the
    first save and load take longer.

    Args:
        view: a cache whose blocks nothing uses yet.
        form: of its stored blocks.
        by_layer: loads are by layer.
    """
    whole = view.block_size
    assert whole is not None
    together = lcm(whole, form.block_size)  # tokens of whole blocks of both
    keys = together // form.block_size
    some = view.slots // together
    long = min(some, -(-LONG // (keys * form.image_bytes)))
    try:
        for count in sorted({min(1, some), long}):
            nbytes = count * keys * form.image_bytes
            if nbytes:
                blocks = range(count * together // whole)
                names = [token_bytes(32) for _ in range(count * keys)]
                # Half of the staging is for saves.
                with BlockStore(form, staging=2 * nbytes, host=nbytes) as store:
                    store.save(view, blocks, names).synchronize()
                    store.load(view, blocks, names, by_layer=by_layer).synchronize()
    except (PortaKVError, RuntimeError) as error:  # also without memory of the device
        _log.warning("warm up", "The first save or load of an engine will be slow: %s", error)
