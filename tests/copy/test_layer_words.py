# SPDX-License-Identifier: Apache-2.0
"""Words of layers on the host: what raises them, and what holds them down."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest
import torch
from support.waits import LIMIT, until
from support.word_cases import LAYERS, Words

from portakv.copy.layer_words import LayerWords
from portakv.errors import (
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.runtime.streams import LAST, is_before
from portakv.runtime.transfer import Completion, Transfer

ERRORS = [TransferError, TransferCancelled, TransferTimeout]


class Held:
    """Work that no stream orders, and that ends when a test says so."""

    #: Those of the running test.
    made: ClassVar[list[Held]] = []

    def __init__(self) -> None:
        self.ended = False
        self.error: PortaKVError | None = None
        self.made.append(self)

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.ended

    def wait(self) -> None:
        raise AssertionError("nothing may block for it")


def watching() -> set[threading.Thread]:
    """Return the threads that look for the ends of loads."""
    return {each for each in threading.enumerate() if each.name == "portakv-layer-words"}


@pytest.fixture(autouse=True)
def all_ended() -> Iterator[None]:
    """End the work that a test leaves: a thread looks for its end all the time, until it comes."""
    before = watching()
    yield
    for each in Held.made:
        each.error = None
        each.ended = True
    Held.made.clear()
    assert until(lambda: watching() <= before), "a thread still looks for ends"


def ends(held: Sequence[Held]) -> list[Transfer]:
    return [Transfer([Completion(pendings=(each,))]) for each in held]


def held_layers() -> list[Held]:
    return [Held() for _ in range(LAYERS)]


def test_no_wait_before_the_first_load_and_after_rest() -> None:
    words = Words()
    for layer in range(LAYERS):
        words.wait(layer)
    held = held_layers()
    words.step(ends(held))
    assert words.lacking == [0, 1, 2]
    words.rest()
    assert words.lacking == []
    for each in held:
        each.ended = True
    assert until(lambda: words.quiet)


def test_each_layer_is_raised_at_its_end() -> None:
    words = Words()
    held = held_layers()
    words.step(ends(held))
    for layer in range(LAYERS):
        assert words.lacking == [*range(layer, LAYERS)]
        held[layer].ended = True
        assert until(lambda past=layer: words.lacking == [*range(past + 1, LAYERS)])


def test_copies_that_streams_order_need_no_thread() -> None:
    words = Words()
    words.step([Transfer()] * LAYERS, [Transfer()] * LAYERS)
    assert words.lacking == []
    assert words.quiet


def test_an_end_of_another_kind_is_waited_for() -> None:
    """A server's load has one end for all layers, and no stream orders it."""
    waits = list[object]()

    class Kept:
        def done(self) -> bool:
            raise AssertionError("it is waited for")

        def wait(self, stream: torch.Stream | None = None) -> None:
            waits.append(stream)

    words = Words()
    words.step([Kept()] * LAYERS)
    assert len(waits) == LAYERS
    assert words.lacking == []


def test_a_layer_waits_for_all_loads_of_its_step() -> None:
    words = Words()
    first = held_layers()
    second = held_layers()
    words.step(ends(first), ends(second), [Transfer()] * LAYERS)
    for each in (*first, second[0]):
        each.ended = True
    assert until(lambda: words.lacking == [1, 2])
    for each in second:
        each.ended = True
    assert until(lambda: words.quiet)
    assert words.lacking == []


def test_words_stay_down_until_all_loads_are_followed() -> None:
    """Else the end of the first load would raise them before the second has begun."""
    words = Words()
    words.begin()
    words.follow([Transfer()] * LAYERS)
    assert words.lacking == [0, 1, 2]
    words.commit()
    assert words.lacking == []


def test_a_late_end_of_an_earlier_step_raises_no_word_of_a_later_one() -> None:
    words = Words()
    early = held_layers()
    late = held_layers()
    words.step(ends(early))
    words.step(ends(late))
    for each in early:
        each.ended = True
    assert until(lambda: words.watched == 1)
    assert words.lacking == [0, 1, 2]
    for each in late:
        each.ended = True
    assert until(lambda: words.quiet)
    assert words.lacking == []


def wait_for_all(words: Words) -> None:
    for layer in range(LAYERS):
        words.wait(layer)


class Believing(Words):
    """Negative control: takes an error for no end."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def _is_done(self, end: Transfer) -> bool:
        self.looks += 1
        try:
            return end.done()
        except PortaKVError:
            return False


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_end_by_an_error_raises_words(guard: bool, error: type[PortaKVError]) -> None:
    """A load that failed, was cancelled or came too late: a thread that waits for it goes on.

    Without the guard it waits until words are closed.
    """
    words = Words() if guard else Believing()
    held = held_layers()
    words.step(ends(held))
    waiting = threading.Thread(target=wait_for_all, args=[words])
    waiting.start()
    for each in held:
        each.error = error("it ended")
    if not isinstance(words, Believing):
        waiting.join(LIMIT)
        assert not waiting.is_alive()
        assert not words.expired
        return
    looked = words.looks
    assert until(lambda: words.looks > looked + 20)
    assert words.lacking == [0, 1, 2]
    assert waiting.is_alive()
    words.close()
    waiting.join(LIMIT)
    assert not waiting.is_alive()
    for each in held:
        each.error = None
        each.ended = True
    assert until(lambda: words.quiet)


def test_a_wait_that_the_host_never_raises_ends_at_its_limit() -> None:
    """All later waits of that step end at once, and those of the next step wait again."""
    words = Words(limit=1e-3)
    held = held_layers()
    words.step(ends(held))
    assert not words.expired
    words.wait(1)
    assert words.expired
    assert words.lacking == []
    words.step(ends(held_layers()))
    assert not words.expired
    assert words.lacking == [0, 1, 2]


def test_closing_raises_all_words_and_says_so() -> None:
    words = Words()
    words.step([Transfer()] * LAYERS)
    words.close()
    assert not words.expired
    words.step(ends(held_layers()))
    words.close()
    assert words.lacking == []
    assert words.expired


def test_closing_raises_words_of_loads_that_are_not_issued() -> None:
    """A thread issues them, and may hang."""
    words = Words()
    words.begin()
    assert words.lacking == [0, 1, 2]
    words.close()
    assert words.lacking == []
    assert words.expired
    words.commit()
    words.step(ends(held_layers()))
    assert words.lacking == [0, 1, 2], "a later step waits again"
    assert not words.expired


def test_numbers_begin_anew_after_the_last_one() -> None:
    assert not is_before(7, 7)
    assert is_before(7, 8)
    assert not is_before(8, 7)
    assert is_before(LAST, 1)
    assert not is_before(1, LAST)
    words = Words()
    words.count_from(LAST - 1)
    for _ in range(4):  # the first of them has the last number
        held = held_layers()
        words.step(ends(held))
        assert words.lacking == [0, 1, 2]
        for each in held:
            each.ended = True
        assert until(lambda: not words.lacking)


def test_a_model_of_any_steps() -> None:
    """A layer is there exactly if all loads that were followed have ended in it and before it."""
    chance = random.Random(7)
    words = Words()
    open_loads = list[list[Held]]()
    for _ in range(60):
        if chance.random() < 0.5 or not open_loads:
            loads = [held_layers() for _ in range(chance.randrange(3))]
            open_loads += loads
            words.step(*(ends(load) for load in loads))
        else:
            load = chance.choice(open_loads)
            next(each for each in load if not each.ended).ended = True
        open_loads = [load for load in open_loads if not load[-1].ended]
        lacking = [n for n in range(LAYERS) if not all(load[n].ended for load in open_loads)]
        assert until(lambda expected=lacking: words.lacking == expected)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(Unsupported, match="A wait inside a graph"):
        LayerWords(torch.device("meta"), LAYERS)
