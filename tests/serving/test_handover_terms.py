# SPDX-License-Identifier: Apache-2.0
"""The terms of hand-overs, and what a request carries from one engine to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portakv.errors import InvalidTerms
from portakv.migrate import Ticket
from portakv.serving.handover import (
    KEY,
    HandoverTerms,
    Identity,
    parameters_of,
    read_rows,
    rows_in,
)
from portakv.serving.plan import RemoteRows

PROMPT = [*range(100, 140)]
SAME = Identity.of("model", PROMPT, b"salt", [b"image"])
ROWS = RemoteRows((Ticket.of("ipc:///a", bytes(16), b"n" * 32),) * 2, len(PROMPT), 30.0)


def carried(**changed: Any) -> dict[str, Any]:
    """Return what a request carries, after it was JSON on the way."""
    made: dict[str, Any] = json.loads(json.dumps(parameters_of(ROWS, SAME)))
    return {KEY: {**made, **changed}}


def test_what_a_request_carries_is_read_again() -> None:
    assert rows_in(carried(), SAME, len(PROMPT)) == ROWS


@pytest.mark.parametrize(
    "other",
    [
        Identity.of("other", PROMPT, b"salt", [b"image"]),
        Identity.of("model", [*PROMPT[:-1], 7], b"salt", [b"image"]),
        Identity.of("model", PROMPT, b"", [b"image"]),
        Identity.of("model", PROMPT, b"salt", []),
        Identity.of("model", PROMPT, b"salti", [b"mage"]),
    ],
    ids=["model", "prompt", "salt", "images", "a part that moved"],
)
def test_rows_of_something_else_are_not_taken(other: Identity) -> None:
    with pytest.raises(InvalidTerms, match="Expected a ticket for the same"):
        read_rows(carried()[KEY], other, len(PROMPT))


def test_a_prompt_is_computed_and_one_line_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert rows_in({}, SAME, len(PROMPT)) is None
    (line,) = caplog.messages
    assert "A prompt is computed" in line
    assert "got none. Use PortaKVConnector" in line


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({KEY: None}, "got none. Use PortaKVConnector"),
        ({KEY: "text"}, "got none. Use PortaKVConnector"),
        (carried(version=2), "version 1, got none"),
        (carried(tokens=39), "tokens"),
        (carried(tokens=True), "tokens"),
        (carried(lease=-1), "lease"),
        (carried(lease="long"), "lease"),
        (carried(tickets=[]), "tickets of an engine's workers"),
        (carried(tickets=["00"] * 2000), "tickets of an engine's workers"),
        (carried(tickets=["no hex"]), "hexadecimal"),
        (carried(tickets=[5]), "hexadecimal"),
    ],
)
def test_other_values_are_not_taken(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        read_rows(wrong[KEY], SAME, len(PROMPT))


def test_terms_of_a_configuration() -> None:
    assert HandoverTerms.of({}) == HandoverTerms()
    terms = HandoverTerms.of({"address": "tcp://10.0.0.1:5600", "secret_file": "/a", "lease": 5})
    assert terms.address_of(0) == "tcp://10.0.0.1:5600"
    assert terms.address_of(3) == "tcp://10.0.0.1:5603"
    free = HandoverTerms.of({"address": "tcp://10.0.0.1:0", "secret_file": "/a"})
    assert free.address_of(3) == "tcp://10.0.0.1:0"
    assert HandoverTerms().address_of(3) is None
    last = HandoverTerms.of({"address": "tcp://10.0.0.1:65535", "secret_file": "/a"})
    with pytest.raises(InvalidTerms, match="address"):
        last.address_of(1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (7, "hand_over to be an object, got an int"),
        ({"adress": None}, "got 'adress'"),
        ({"address": "10.0.0.1"}, "address"),
        ({"address": "tcp://10.0.0.1:0"}, "secret"),
        ({"lease": 0}, "lease"),
        ({"lease": 2e6}, "lease"),  # more than an offer can have
        ({"timeout": None}, "timeout"),
        ({"max_gbps": -1}, "max_gbps"),
        ({"expose": "all"}, "expose"),
        ({"transport": ""}, "transport"),
        ({"secret_file": ""}, "secret_file"),
    ],
)
def test_wrong_terms_are_named(wrong: Any, says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        HandoverTerms.of(wrong)


def test_a_secret_is_read_from_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    terms = HandoverTerms(secret_file=str(file))
    assert HandoverTerms().secret() is None
    with pytest.raises(InvalidTerms, match="secret_file to be a file"):
        terms.secret()
    file.write_bytes(b"0123456789abcdef\n")
    file.chmod(0o640)
    with pytest.raises(InvalidTerms, match="only this user may read"):
        terms.secret()
    file.chmod(0o600)
    assert terms.secret() == b"0123456789abcdef"
    file.write_bytes(b"short\n")
    with pytest.raises(InvalidTerms, match="secret_file: Expected a secret of 16 bytes"):
        terms.secret()
