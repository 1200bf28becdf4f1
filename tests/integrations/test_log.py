# SPDX-License-Identifier: Apache-2.0
"""Lines of PortaKV in an engine: its handlers and its level, unless the user has chosen others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from portakv.integrations import log_through


class Lines(logging.Handler):
    """A handler that keeps its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Loggers:
    """The loggers of an engine, of PortaKV and of the root, each with the lines of its handler."""

    def __init__(self) -> None:
        self.engine = logging.Logger("engine", logging.INFO)
        self.own = logging.getLogger("portakv")
        self.root = logging.getLogger()
        self.lines = Lines()

    def log(self) -> None:
        """Log a line of each level, as a module of PortaKV does."""
        module = logging.getLogger("portakv.serving.local")
        module.debug("debug")
        module.info("info")
        module.warning("warning")


@contextmanager
def handed() -> Iterator[Loggers]:
    """Give the loggers no handlers, those of pytest included, and put them back at the end."""
    made = Loggers()
    both = made.own, made.root
    before = [(each.handlers, each.level, each.propagate) for each in both]
    for each in both:
        each.handlers = []
        each.setLevel(logging.NOTSET if each is made.own else logging.WARNING)
    made.own.propagate = True
    try:
        yield made
    finally:
        for each, (handlers, level, propagates) in zip(both, before, strict=True):
            each.handlers = handlers
            each.setLevel(level)
            each.propagate = propagates


def test_lines_take_the_handlers_of_the_engine() -> None:
    """Once each, also where doors are made again, and where a root gets a handler later."""
    with handed() as loggers:
        loggers.engine.addHandler(loggers.lines)
        loggers.engine.propagate = False
        log_through(loggers.engine)
        log_through(loggers.engine)
        later = Lines()
        loggers.root.addHandler(later)
        loggers.log()
        assert loggers.lines.texts == ["info", "warning"]
        assert later.texts == []


def test_without_the_door_only_warnings_show() -> None:
    """Nothing changes before an engine makes a door."""
    with handed() as loggers:
        loggers.engine.addHandler(loggers.lines)
        loggers.log()
        assert loggers.lines.texts == []
        assert not loggers.own.handlers


@pytest.mark.parametrize("whose", ["own", "root"])
def test_handlers_of_the_user_stay_the_only_ones(whose: str) -> None:
    with handed() as loggers:
        users = Lines()
        chosen: logging.Logger = getattr(loggers, whose)
        chosen.addHandler(users)
        loggers.engine.addHandler(loggers.lines)
        loggers.engine.propagate = False
        log_through(loggers.engine)
        loggers.log()
        assert users.texts == ["warning"]
        assert loggers.lines.texts == []
        assert loggers.own.propagate


def test_a_level_of_the_user_stays() -> None:
    with handed() as loggers:
        loggers.own.setLevel(logging.ERROR)
        loggers.engine.addHandler(loggers.lines)
        log_through(loggers.engine)
        loggers.log()
        assert loggers.lines.texts == []


def test_an_engine_without_handlers_changes_nothing() -> None:
    """Such as vLLM with VLLM_CONFIGURE_LOGGING=0."""
    with handed() as loggers:
        log_through(loggers.engine)
        assert not loggers.own.handlers
        assert loggers.own.propagate
        assert loggers.own.level == logging.NOTSET
