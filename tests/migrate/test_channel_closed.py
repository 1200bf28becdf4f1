# SPDX-License-Identifier: Apache-2.0
"""A channel that is closed, or that could not be opened, leaves nothing."""

from __future__ import annotations

import errno
import os

import pytest
import zmq
from support.migrate_channels import SECRET
from support.waits import LIMIT, until

from portakv.errors import PeerError
from portakv.migrate.channel import Channel, Sockets

TCP = "tcp://127.0.0.1:0"


def test_a_channel_without_a_socket_to_listen_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process has no descriptor left for it."""
    Channel(TCP, secret=SECRET).close()  # what the process opens once

    def refuse(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(Sockets, "server", refuse)
        with pytest.raises(PeerError, match="this process has too many open files: `ulimit -n`"):
            Channel(TCP, secret=SECRET)
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before, LIMIT)


def test_a_channel_that_is_closed_takes_no_user_and_leaves_no_descriptor() -> None:
    Channel().close()  # what the process opens once
    before = len(os.listdir("/proc/self/fd"))
    channel = Channel()
    channel.close()
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before, LIMIT)
    with pytest.raises(PeerError, match="channel that is open, got one that is closed"):
        channel.claim("an owner", object())
