# SPDX-License-Identifier: Apache-2.0
"""Check the address and the secret of a channel, and make its keys."""

from __future__ import annotations

import re
from contextlib import suppress
from hashlib import blake2b

import zmq
from zmq.utils import z85

from portakv.arguments import invalid, kind_of
from portakv.errors import InvalidTerms

#: Addresses of other hosts are numeric: a name would block ZeroMQ's only thread in a resolver.
NUMERIC = re.compile(r"tcp://([0-9.]{7,15}|\[[0-9a-fA-F:.%]+[0-9a-zA-Z]*\]):([0-9]{1,5})")


def too_short(secret: object) -> str:
    """Return the error text for a secret that is too short; empty if it serves."""
    got = f"a secret of {len(secret)}" if isinstance(secret, bytes | str) else kind_of(secret)
    if isinstance(secret, str) and not secret.isascii():
        with suppress(UnicodeEncodeError):  # a lone surrogate has no UTF-8
            secret = secret.encode()
        if isinstance(secret, str):  # the codec's error contains the text
            return "Expected a secret that UTF-8 can hold, got a text that it cannot. Pass bytes."
    if isinstance(secret, bytes | str) and len(secret) >= 16:
        return ""
    return f"Expected a secret of 16 bytes or more, got {got}. Pass secrets.token_bytes(32)."


def check_address(address: str | None, secret: bool) -> None:
    """Raise `InvalidTerms` for an address at which no channel can listen."""
    if address is None:
        return
    example = "Pass None, or one such as 'tcp://10.0.0.1:0'."
    expected = "None, or tcp:// with a numeric address or an interface and a port of 0 to 65535"
    if not isinstance(address, str) or not address.startswith("tcp://"):
        raise invalid("address", expected, address, example)
    numeric = NUMERIC.fullmatch(address)
    port = address.rpartition(":")[2]
    interface = re.fullmatch(r"tcp://[A-Za-z0-9_.*-]{1,255}:[0-9]{1,5}", address)
    if not (numeric or interface) or int(port) > 65535:
        raise invalid("address", expected, address, example)
    if not secret:
        raise InvalidTerms(
            f"Expected a secret with {address}, got none. Pass secret=, as TCP connections are "
            f"always encrypted."
        )


def keys_of(secret: bytes | str) -> tuple[bytes, ...]:
    """Return the public and the private key that a secret gives."""
    secret_bytes = secret.encode() if isinstance(secret, str) else secret
    key = z85.encode(blake2b(secret_bytes, digest_size=32, person=b"portakv-curve").digest())
    return zmq.curve_public(key), key
