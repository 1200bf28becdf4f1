# SPDX-License-Identifier: Apache-2.0
"""An owner in a separate process, for tests that kill it: it gives one large buffer of sevens."""

from __future__ import annotations

import time
from typing import Any

import torch

from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Bye
from portakv.migrate.transports import choose

if __name__ == "__main__":
    channel = Channel()
    transport = choose(torch.device("cpu"))
    buffer = torch.full((1 << 29,), 7, dtype=torch.uint8)

    def handshake(peer: Any, _: Bye) -> Answer:
        for kind in transport.asks:
            channel.serve(
                kind, lambda reader, requested: transport.answer(reader, channel, requested)
            )
        transport.lane(peer, channel).move(buffer, 0)
        return Answer("done")

    channel.serve(Bye, handshake)
    print(channel.address, buffer.nbytes, flush=True)
    time.sleep(300)
