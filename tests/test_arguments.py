# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of the public names of storage, graph and migrate, generated from signatures.

Each argument is replaced in turn by values that are mostly wrong. A call returns, or raises a
`PortaKVError` that names the argument. The object works and closes afterwards, and a call that
raised has written nothing.
"""

from __future__ import annotations

import inspect
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from support.graph_ends import submit
from support.migrate_pulls import MODEL, Rows
from support.storage_cases import key_of, small_form
from support.waits import LIMIT

import portakv
from portakv import InvalidTerms, KVView, Pack, PortaKVError
from portakv.arguments import kind_of
from portakv.graph import Collector
from portakv.migrate import (
    Channel,
    Owner,
    Reader,
    Shard,
    Ticket,
    open_shared,
    pair,
    rendezvous,
    share,
    shared_empty,
)
from portakv.storage import AutoEncoding, BlockForm, BlockStore, Disk, Remote, keys, prefix_keys
from portakv.storage.lent import LentCopy
from portakv.storage.work import Graph, Handle, Task
from portakv.weights import (
    Box,
    Parameter,
    open_model,
    prepare_weights,
    publish,
    pull_weights,
    share_model,
)
from portakv.weights.owner import Published
from portakv.witness import Witness

API = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PACKAGES = "portakv.storage", "portakv.graph", "portakv.migrate", "portakv.witness"
#: Entries whose arguments are objects of others: OpenTelemetry's providers, a clock.
NOT_CHECKED = "portakv.graph.open_telemetry", "portakv.graph.alarms.Alarms"
FORM = [*inspect.signature(BlockForm).parameters]
T = TypeVar("T")


class Copies:
    """A copier that makes no copy: the test ends those that began."""

    def __init__(self, end: bool = False) -> None:
        self.begun = list[LentCopy]()
        self._end = end

    def begin(self, copy: LentCopy) -> None:
        self.begun.append(copy)
        if self._end:
            copy.end()


def needs_blake3() -> Callable[..., Any]:
    """Return `lmcache_keys`; skip the test without blake3, which Python 3.10 has not."""
    pytest.importorskip("blake3", reason="LMCache's keys need blake3")
    return keys.lmcache_keys


class Scene:
    """The objects that calls need, made anew for each argument, and closed after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.memory = [torch.arange(4 * 2 * 8 * 4 * 2 * 32).view(4, 2, 8, 4, 2, 32).half()]
        self.view = KVView([*self.memory[0]], "layer | kv block token head dim")
        self.other = KVView([torch.zeros(2, 3, 2, 1, 8)], "layer | kv block token head dim")

    def close(self, thing: T) -> T:
        self.stack.callback(cast(Any, thing).close)
        return thing

    def form(self) -> BlockForm:
        return BlockForm.of(self.view, "org/model")

    def packable(self) -> BlockForm:
        rows = torch.zeros(2, 2, 16, 2, 32, dtype=torch.bfloat16, device="cpu")
        return BlockForm.of(KVView([rows], "layer | kv block token head dim"), "org/model")

    def store(self, **terms: Any) -> BlockStore:
        size = self.form().image_bytes
        return self.close(
            BlockStore(self.form(), **{"staging": 4 * size, "host": 4 * size, **terms})
        )

    def saved(self) -> BlockStore:
        store = self.store()
        store.save(self.view, [0, 1], [key_of(0), key_of(1)]).synchronize(LIMIT)
        return store

    def lent(self) -> LentCopy:
        """Return a copy that a store lent, and that has not ended."""
        copies = Copies()
        self.saved().load_lent(copies, [key_of(0)])
        return copies.begun[0]

    def graph(self) -> Graph:
        return self.close(Graph())

    def task(self, graph: Graph) -> Task:
        task = Task(lambda *_: None, 2, queue=graph.queue("a"))
        submit(graph, [task])
        return task

    def witness(self) -> Witness:
        return self.close(Witness(self.view, check="all", nbytes=1 << 20))

    def channel(self) -> Channel:
        return self.close(Channel())

    def rows(self) -> Rows:
        rows = Rows()
        self.memory.append(rows.whole)
        return rows

    def owner(self) -> Owner:
        return self.close(Owner(self.channel(), self.rows().shard, model=MODEL))

    def reader(self) -> Reader:
        return self.close(Reader(self.channel(), self.rows().shard, model=MODEL))

    def offer(self) -> Any:
        return self.owner().offer([1, 2], tokens=32, lease=5.0)

    def revoking(self) -> tuple[Any, dict[str, Any]]:
        """Return a call with a ticket of the same owner."""
        owner = self.owner()
        return owner.revoke, {"ticket": owner.offer([1, 2], tokens=32, lease=5.0).ticket}

    def module(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2).share_memory()

    def weights(self) -> Any:
        tensor = shared_empty((4, 4), torch.float32)
        self.memory.append(tensor)
        return tensor


#: How each public callable is called rightly: the callable and its arguments, by name.
Call = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Callable[[Scene], Call]] = {
    # witness
    "Witness": lambda s: (
        lambda **terms: s.close(Witness(**terms)),
        {"views": s.view, "nbytes": 1 << 20, "file": s.folder / secrets.token_hex(4)},
    ),
    "Witness.stored": lambda s: (s.witness().stored, {"blocks": [0], "keys": [key_of(0)]}),
    "Witness.restored": lambda s: (s.witness().restored, {"blocks": [0], "keys": [key_of(0)]}),
    "Witness.settle": lambda s: (s.witness().settle, {}),
    "Witness.renew": lambda s: (s.witness().renew, {}),
    "Witness.figures": lambda s: (s.witness().figures, {}),
    "Witness.close": lambda s: (s.witness().close, {}),
    # storage
    "BlockForm": lambda s: (BlockForm, {x: getattr(small_form(), x) for x in FORM}),
    "BlockForm.of": lambda s: (BlockForm.of, {"view": s.view, "model": "m"}),
    "BlockForm.from_json": lambda s: (BlockForm.from_json, {"text": s.form().json()}),
    "BlockForm.view": lambda s: (
        s.form().view,
        {"rows": torch.zeros(2, s.form().image_bytes, dtype=torch.uint8)},
    ),
    "BlockForm.packed": lambda s: (s.packable().packed, {"pack": Pack()}),
    "BlockForm.same_cache": lambda s: (s.form().same_cache, {"other": s.form()}),
    "BlockForm.part_of": lambda s: (s.form().part_of, {"other": s.form()}),
    "BlockStore": lambda s: (BlockStore, {"form": s.form(), "staging": 1 << 20, "host": 1 << 20}),
    "BlockStore.of": lambda s: (s.saved().of, {"name": ""}),
    "BlockStore.lookup": lambda s: (s.saved().lookup, {"keys": [key_of(0)]}),
    "BlockStore.lookup_each": lambda s: (s.saved().lookup_each, {"keys": [key_of(0)]}),
    "BlockStore.has": lambda s: (s.saved().has, {"key": key_of(0)}),
    "BlockStore.leading": lambda s: (s.saved().leading, {"keys": [key_of(0)]}),
    "BlockStore.has_each": lambda s: (s.saved().has_each, {"keys": [key_of(0)]}),
    "BlockStore.touch": lambda s: (s.saved().touch, {"keys": [key_of(0)]}),
    "BlockStore.pin": lambda s: (s.saved().pin, {"keys": [key_of(0)]}),
    "BlockStore.delete": lambda s: (s.saved().delete, {"keys": [key_of(0)]}),
    "BlockStore.borrow": lambda s: (s.saved().borrow, {"keys": [key_of(0)]}),
    "BlockStore.save": lambda s: (
        s.saved().save,
        {"view": s.view, "blocks": [2], "keys": [key_of(2)]},
    ),
    "BlockStore.load": lambda s: (
        s.saved().load,
        {"view": s.view, "blocks": [0], "keys": [key_of(0)]},
    ),
    "BlockStore.save_lent": lambda s: (
        s.saved().save_lent,
        {"copier": Copies(end=True), "keys": [key_of(2)]},
    ),
    "BlockStore.load_lent": lambda s: (
        s.saved().load_lent,
        {"copier": Copies(end=True), "keys": [key_of(0)]},
    ),
    "LentCopy.end": lambda s: (s.lent().end, {}),
    "BlockStore.finished": lambda s: (s.saved().finished, {}),
    "BlockStore.finished_fd": lambda s: (s.saved().finished_fd, {}),
    "BlockStore.keys": lambda s: (s.saved().keys, {}),
    "BlockStore.listen": lambda s: (s.saved().listen, {}),
    "BlockStore.listen_fd": lambda s: (s.saved().listen_fd, {}),
    "BlockStore.prefetch": lambda s: (s.saved().prefetch, {"keys": [key_of(0)]}),
    "BlockStore.trace": lambda s: (s.saved().trace, {"path": s.folder / "trace.json"}),
    "BlockStore.close": lambda s: (s.saved().close, {}),
    "AutoEncoding": lambda s: (AutoEncoding, {"link_gbps": 1.0}),
    "Disk": lambda s: (Disk, {"folders": s.folder / "disk", "capacity": 1 << 20}),
    "Remote": lambda s: (Remote, {"url": "memory://"}),
    "check_keys": lambda s: (keys.check_keys, {"keys": [key_of(0)]}),
    "check_key": lambda s: (
        keys.check_key,
        {"what": "a key", "key": key_of(0), "do": "Pass it.", "weak_keys": False},
    ),
    "different_keys": lambda s: (keys.different_keys, {"keys": [key_of(0)]}),
    "predecessors": lambda s: (keys.predecessors, {"after": None, "keys": [key_of(0)]}),
    "prefix_keys": lambda s: (prefix_keys, {"tokens": range(8), "block_size": 4}),
    "lmcache_keys": lambda s: (needs_blake3(), {"tokens": range(8), "block_size": 4}),
    "vllm_keys": lambda s: (keys.vllm_keys, {"tokens": range(8), "block_size": 4}),
    # graph
    "Graph": lambda s: (Graph, {}),
    "Graph.queue": lambda s: (s.graph().queue, {"name": "b"}),
    "Graph.close": lambda s: (s.graph().close, {}),
    "Handle.wait": lambda s: (Handle(s.task(s.graph())).wait, {}),
    "Collector": lambda s: (Collector, {"sources": s.graph()}),
    # migrate
    "Channel": lambda s: (Channel, {}),
    "Shard": lambda s: (Shard, {"view": s.view}),
    "Owner": lambda s: (Owner, {"channel": s.channel(), "shards": s.rows().shard, "model": MODEL}),
    "Owner.offer": lambda s: (s.owner().offer, {"blocks": [1], "tokens": 4}),
    "Owner.reallocate": lambda s: (s.owner().reallocate, {"shards": s.rows().shard}),
    "Owner.revoke": lambda s: s.revoking(),
    "Offer.raise_to": lambda s: (
        s.owner().offer([1], tokens=4, progress="layers").raise_to,
        {"mark": 1},
    ),
    "Offer.extend": lambda s: (s.offer().extend, {"seconds": 40.0}),
    "Offer.taken": lambda s: (s.offer().taken, {"timeout": 0.01}),
    "Ticket": lambda s: (Ticket, {}),
    "Ticket.of": lambda s: (
        Ticket.of,
        {"address": "ipc:///x", "epoch": bytes(16), "name": b"sixteen bytes..."},
    ),
    "Reader": lambda s: (
        Reader,
        {"channel": s.channel(), "shards": s.rows().shard, "model": MODEL},
    ),
    "Reader.pull": lambda s: (s.reader().pull, {"tickets": s.offer().ticket, "blocks": [1, 2]}),
    "Reader.extend": lambda s: (
        s.reader().extend,
        {"ticket": s.offer().ticket, "seconds": 40.0},
    ),
    "Reader.prepare": lambda s: (s.reader().prepare, {"address": s.owner().channel.address}),
    "Reader.explain": lambda s: (s.reader().explain, {"tickets": s.offer().ticket}),
    "Reader.trace": lambda s: (s.reader().trace, {"path": s.folder / "trace.json"}),
    "publish": lambda s: (publish, {"channel": s.channel(), "parameters": {"a": s.weights()}}),
    "Published": lambda s: (Published, {"channel": s.channel(), "parameters": {"a": s.weights()}}),
    "share_model": lambda s: (share_model, {"module": s.module()}),
    "open_model": lambda s: (
        open_model,
        {"module": torch.nn.Linear(2, 2), "data": s.close(share_model(s.module())).data},
    ),
    "prepare_weights": lambda s: (
        prepare_weights,
        {
            "channel": s.channel(),
            "parameters": {"a": s.weights()},
            "tickets": s.close(publish(s.channel(), {"a": s.weights()})).ticket,
        },
    ),
    "pull_weights": lambda s: (
        pull_weights,
        {
            "channel": s.channel(),
            "parameters": {"a": s.weights()},
            "tickets": s.close(publish(s.channel(), {"a": s.weights()})).ticket,
        },
    ),
    "Box": lambda s: (Box, {"offset": (0,), "start": (0,), "extents": (1,)}),
    "Box.part": lambda s: (Box((0,), (0,), (4,)).part, {"ends": ((0, 1),)}),
    "Parameter": lambda s: (Parameter, {"tensor": s.weights()}),
    "Parameter.split": lambda s: (
        Parameter.split,
        {"tensor": s.weights(), "axis": 0, "parts": [8], "cut": (0, 2)},
    ),
    "share": lambda s: (share, {"tensor": s.weights()}),
    "open_shared": lambda s: (open_shared, {"data": share(s.weights())}),
    "shared_empty": lambda s: (shared_empty, {"shape": (2, 2), "dtype": torch.float32}),
    "rendezvous": lambda s: (rendezvous, {"channel": s.channel()}),
    "pair": lambda s: (
        pair,
        {"store": rendezvous(s.channel()), "rank": 0, "size": 1, "device": "cpu", "timeout": 5.0},
    ),
}


def wrong_values(scene: Scene) -> list[Any]:
    """Return the values that replace each argument."""
    return [None, -1, float("nan"), 2**63, "", b"", [], object(), scene.other]


def documented() -> Iterator[tuple[str, Any]]:
    """Yield the public callables of the packages, found in docs/api.md and in `__all__`."""
    entries = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", API.read_text(), re.M)
    seen = set[Any]()
    for path, options in entries:
        if not path.startswith(PACKAGES) or path in NOT_CHECKED:
            continue
        members = _listed_members(options)
        module, _, name = path.rpartition(".")
        with suppress(ImportError):  # it is a module
            for each, value in _of_module(path, members):
                seen.add(value)
                yield from _callables(each, value, None, True)
            continue
        kind = getattr(import_module(module), name)
        seen.add(kind)
        yield from _callables(name, kind, members, "merge_init_into_class: false" not in options)
    for package in PACKAGES:
        module_ = import_module(package)
        for name in module_.__all__:
            value = getattr(module_, name)
            error = inspect.isclass(value) and issubclass(value, PortaKVError)
            if value not in seen and not error:
                yield from _callables(name, value, None, True)


def _listed_members(options: str) -> list[str] | None:
    """Return the members that an entry of the page lists; None if it lists no members."""
    listed = re.search(r"members: \[(.*)\]", options)
    if listed is None:
        return None
    return listed[1].split(", ") if listed[1] else []


def _of_module(path: str, members: list[str] | None) -> list[tuple[str, Any]]:
    """Return the public members of a module, by default its own functions, with their names."""
    module = import_module(path)
    own = members or [
        x for x, y in vars(module).items() if inspect.isfunction(y) and y.__module__ == path
    ]
    return [(each, getattr(module, each)) for each in own if not each.startswith("_")]


def _callables(name: str, value: Any, members: Any, made: bool) -> Iterator[tuple[str, Any]]:
    if not inspect.isclass(value):
        yield name, value
        return
    if made:
        yield name, value
    chosen = members if members is not None else [x for x in dir(value) if not x.startswith("_")]
    for each in chosen:
        method = inspect.getattr_static(value, each)
        method = getattr(method, "__func__", method)
        own = inspect.isfunction(method) and method.__module__.startswith("portakv")
        if own:
            yield f"{name}.{each}", method


def arguments() -> list[tuple[str, str]]:
    """Return the public callables with each of their arguments."""
    pairs = dict[tuple[str, str], None]()
    for name, value in documented():
        parameters = inspect.signature(value).parameters.values()
        pairs.update({(name, x.name): None for x in parameters if x.name not in ("self", "cls")})
    return [*pairs]


@pytest.mark.parametrize("name", sorted({name for name, _ in arguments()}))
def test_each_public_callable_has_a_right_call(name: str, tmp_path: Path) -> None:
    assert name in CALLS, f"add a right call of {name} to CALLS"
    scene = Scene(tmp_path)
    with scene.stack:
        call, terms = CALLS[name](scene)
        _end(invoke(call, terms))


@pytest.mark.parametrize(("name", "argument"), arguments(), ids=str)
def test_a_wrong_argument_is_named(name: str, argument: str, tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    with scene.stack:
        call, terms = CALLS[name](scene)
        for value in wrong_values(scene):
            before = [each.clone() for each in scene.memory]
            result = limited(call, {**terms, argument: value})
            what = f"{name}({argument}={value!r}): {result!r}"
            if isinstance(result, BaseException):
                assert isinstance(result, PortaKVError), what
                assert re.search(rf"\b{argument}\b", str(result)), what
                for old, new in zip(before, scene.memory, strict=True):
                    assert torch.equal(old, new), what
            else:
                _end(result)
        if name.rpartition(".")[2] not in ("close", "taken"):  # it works still
            _end(invoke(*CALLS[name](scene)))


@pytest.mark.parametrize("number", ["len(number)", "'0' * number", "[1][number]"])
def test_the_sweep_finds_what_is_not_checked(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a function whose errors are Python's own."""
    call = eval(f"lambda number: {number}")
    monkeypatch.setitem(CALLS, "unchecked", lambda scene: (call, {"number": 0}))
    with pytest.raises(AssertionError, match="unchecked"):
        test_a_wrong_argument_is_named("unchecked", "number", tmp_path)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("Disk", "admit", "second"),
        ("Disk", "io", "ring"),
        ("BlockStore", "full", "drop"),
        ("BlockStore.save", "priority", "urgent"),
        ("BlockStore.load", "missing", "skip"),
        ("Owner", "expose", "staging"),
        ("Reader.pull", "overlap", "idle"),
    ],
)
def test_a_word_that_an_argument_does_not_know_is_named_with_those_that_it_does(
    name: str, argument: str, values: str, tmp_path: Path
) -> None:
    scene = Scene(tmp_path)
    with scene.stack:
        call, terms = CALLS[name](scene)
        with pytest.raises(InvalidTerms, match=rf"{argument}.*{values}"):
            invoke(call, {**terms, argument: "iddle"})


def test_the_sweep_finds_what_is_public() -> None:
    names = {name for name, _ in arguments()}
    assert {"BlockStore.save", "Graph.queue", "Owner.offer", "prefix_keys"} <= names
    assert len(arguments()) > 120


def invoke(call: Callable[..., Any], terms: dict[str, Any]) -> Any:
    """Call with arguments by name; those of `*args` and of positions go by position."""
    positional = list[Any]()
    named = dict(terms)
    for each in inspect.signature(call).parameters.values():
        if each.kind is each.VAR_KEYWORD and each.name in named:
            value = named.pop(each.name)
            named[each.name] = value
        elif each.kind is each.KEYWORD_ONLY or each.name not in named:
            continue
        elif len(positional) == len(_before(call, each.name)):
            positional.append(named.pop(each.name))
    return call(*positional, **named)


def _before(call: Callable[..., Any], name: str) -> list[str]:
    names = [*inspect.signature(call).parameters]
    return names[: names.index(name)]


def limited(call: Callable[..., Any], terms: dict[str, Any]) -> Any:
    """Return the result of a call, or the error that it raises; fail if it hangs."""
    results = list[Any]()

    def run() -> None:
        try:
            results.append(invoke(call, terms))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert results, f"{call} hangs with {terms}"
    return results[0]


def _end(result: Any) -> None:
    """Wait for a transfer, and close what was made."""
    if isinstance(result, Handle) or hasattr(result, "published"):
        with suppress(PortaKVError):
            result.synchronize(LIMIT)
    if callable(getattr(result, "close", None)):
        result.close()


def test_one_function_names_the_types_of_values() -> None:
    """It knows the article of a name, and that None has none."""
    values: list[object] = [1, None, [], b""]
    assert [*map(kind_of, values)] == ["an int", "None", "a list", "a bytes"]
    here = Path(portakv.__file__).parent
    own = [
        str(file.relative_to(here))
        for file in sorted(here.rglob("*.py"))
        if re.search(r"\ban? \{type\([^)]*\)\.__name__\}", file.read_text(encoding="utf-8"))
    ]
    assert not own, "use kind_of()"


@pytest.mark.parametrize("package", ["portakv", "portakv.storage", "portakv.migrate"])
def test_public_errors_come_from_each_package(package: str) -> None:
    module = import_module(package)
    wanted = {"PortaKVError", "InvalidTerms", "LayoutError", "SlotError", "Unsupported"}
    wanted |= {"portakv": {"StoreError", "PeerError"}, "portakv.storage": {"StoreError"}}.get(
        package, {"PeerError", "OfferGone"}
    )
    assert wanted <= {*module.__all__}
