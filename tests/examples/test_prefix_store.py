# SPDX-License-Identifier: Apache-2.0
"""The example of a prompt whose blocks outlive their cache, and their process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("obstore")
pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it, for ten seconds


@pytest.fixture
def example() -> Any:
    """Import the example here: it imports transformers, which takes seconds, not while pytest
    collects."""
    from portakv_examples import prefix_store

    return prefix_store


def test_a_second_engine_finds_the_prefix_in_a_remote_store(
    example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.run(["cpu", "--remote", "memory://"]) == 0
    output = capsys.readouterr().out
    assert "the same twice" in output
    assert "0 tokens of the prompt loaded" in output
    assert "after pages of noise: other tokens" in output


@pytest.mark.parametrize(
    ("tokens", "noise", "loaded", "good"),
    [([1], [3], 16, True), ([2], [3], 16, False), ([1], [1], 16, False), ([1], [3], 0, False)],
)
def test_it_fails_if_tokens_differ_or_nothing_was_loaded(
    tokens: list[int],
    noise: list[int],
    loaded: int,
    good: bool,
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([example.Answer(0, 17, [1]), example.Answer(loaded, 1, tokens, noise)])
    monkeypatch.setattr(example.Setup, "engine", lambda *_: next(answers))
    assert example.main(example.Setup(), lambda line: None) is good


def test_a_kill_needs_a_disk(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        example.run(["cpu", "--kill"])
    assert ended.value.code == 2
    assert "--kill goes with --disk" in capsys.readouterr().err
