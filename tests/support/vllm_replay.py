# SPDX-License-Identifier: Apache-2.0
"""Play a recorded trace of hooks on PortaKV's connector, without vLLM, and compare its answers.

The connector, both its sides and its store are the real ones; rows have a few bytes. A module
``vllm`` as `vllm_stub.write_vllm` makes it must be found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from portakv.serving import SchedulerSide
from support.vllm_stub import configuration
from support.vllm_trace import ENGINE, LOSE, PART, SCHEDULER, Event, Recorder, Trace


class Differs(AssertionError):
    """The connector answers otherwise than the trace says."""


class Replay:
    """Two sides of a connector, whose hooks are called as a trace says.

    Requests have tokens that follow from the number of their prompt.

    Args:
        module: of the connector.
        name: of the engine.
        scheduler_side: the class of the connector's `scheduler_side`; None: the connector's.

    Attributes:
        recorder: of the hooks that are called.
    """

    def __init__(
        self,
        module: ModuleType,
        trace: Trace,
        name: str,
        scheduler_side: type[SchedulerSide] | None = None,
    ) -> None:
        about = trace.about
        self._connector: Any = module.PortaKVConnector
        self._roles: Any = module.KVConnectorRole
        self._events = trace.events
        self._layers = [f"layer {number}" for number in range(about["layers"])]
        self._shape = (about["blocks"], 2, about["block_size"])
        self.configurations = configuration("", name, *self._shape[::2])
        terms = self.configurations[0].kv_transfer_config.kv_connector_extra_config
        terms.clear()
        terms |= {"host": 1 << 20, "staging": 1 << 20}
        (group,) = self.configurations[1].kv_cache_groups
        group.layer_names = self._layers
        self._scheduler_side = scheduler_side
        self._sides = dict[str, Any]()
        self._requests = dict[str, Any]()
        self._metadata: Any = None  # of the latest plan
        self._report: Any = None  # of the latest step
        self.recorder = Recorder()

    @property
    def scheduler_side(self) -> SchedulerSide:
        """Return the `SchedulerSide` of the scheduler's connector."""
        scheduler_side: SchedulerSide = self._sides[SCHEDULER].scheduler_side
        return scheduler_side

    def play(self) -> None:
        """Call the hooks of the trace. Raises `Differs` for the first answer that differs."""
        try:
            with self.recorder.recording(self._connector):
                for number, event in enumerate(self._events):
                    self._play(number, event)
        finally:
            for connector in self._sides.values():
                connector.shutdown()

    def _play(self, number: int, event: Event) -> None:
        if event.side == ENGINE:
            self._act(event)
            return
        before = len(self.recorder.events)
        answer = self._call(event)
        made = self.recorder.events[before:]
        if made != [event]:
            raise Differs(f"event {number}: expected {event!r}, got {made!r} ({answer!r})")

    def _act(self, event: Event) -> None:
        """Do what the engine's harness did."""
        if event.hook == PART:
            self.recorder.part(*event.arguments)
        elif event.hook == LOSE:
            self.recorder.lose(*event.arguments)
        else:
            raise ValueError(f"no harness does {event.hook}")

    def _call(self, event: Event) -> Any:
        if event.hook == "__init__":
            role = self._roles[event.side.upper()]
            config, caches = self.configurations
            self._sides[event.side] = made = self._connector(config, role, caches)
            if event.side == SCHEDULER and self._scheduler_side is not None:
                made.scheduler_side.__class__ = self._scheduler_side
            return None
        make: Callable[..., Sequence[Any]] = getattr(self, f"_for_{event.hook}", self._none)
        hook = getattr(self._sides[event.side], event.hook)
        answer = hook(*make(*event.arguments))
        if event.hook == "build_connector_meta":
            self._metadata = answer
        if event.hook == "build_connector_worker_meta":
            self._report = answer
        return answer

    def _none(self, *_: Any) -> Sequence[Any]:
        return ()

    # --- the arguments of hooks, made of what is written of them

    def _request(self, name: str, tokens: int) -> Any:
        """Return a request that has so many tokens now."""
        request = self._requests[name]
        known = request.all_token_ids
        known += [token_of(request.prompt, at) for at in range(len(known), tokens)]
        return request

    def _for_on_new_request(self, name: str, prompt: int, tokens: int) -> Sequence[Any]:
        self._requests[name] = SimpleNamespace(
            request_id=name,
            all_token_ids=[token_of(prompt, at) for at in range(tokens)],
            prompt=prompt,
            cache_salt=None,
            lora_request=None,
            mm_features=[],
        )
        return (self._requests[name],)

    def _for_get_num_new_matched_tokens(
        self, name: str, tokens: int, computed: int
    ) -> Sequence[Any]:
        return self._request(name, tokens), computed

    def _for_update_state_after_alloc(self, name: str, blocks: Any, tokens: int) -> Sequence[Any]:
        known = len(self._requests[name].all_token_ids)
        return self._request(name, known), Blocks(blocks), tokens

    def _for_build_connector_meta(
        self, new: Iterable[Any] = (), old: Iterable[Any] = (), gone: Iterable[str] = ()
    ) -> Sequence[Any]:
        many = dict[str, int]()
        fresh = list[Any]()
        for name, tokens, computed, scheduled, blocks in new:
            self._request(name, tokens)
            many[name] = scheduled
            ids = Blocks(blocks).get_block_ids()
            fresh.append(SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=ids))
        cached = SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[]
        )
        for name, tokens, computed, scheduled, blocks, resumed in old:
            self._request(name, tokens)
            many[name] = scheduled
            cached.req_ids.append(name)
            cached.num_computed_tokens.append(computed)
            cached.new_block_ids.append(None if blocks is None else Blocks(blocks).get_block_ids())
            if resumed:
                cached.resumed_req_ids.add(name)
        output = SimpleNamespace(
            num_scheduled_tokens=many,
            preempted_req_ids={*gone} or None,
            scheduled_new_reqs=fresh,
            scheduled_cached_reqs=cached,
        )
        return (output,)

    def _for_update_connector_output(self, sent: Iterable[str] = ()) -> Sequence[Any]:
        output = SimpleNamespace(
            kv_connector_worker_meta=self._report, finished_sending={*sent} or None
        )
        return (output,)

    def _for_request_finished(self, name: str, tokens: int) -> Sequence[Any]:
        return self._request(name, tokens), []

    _for_request_finished_all_groups = _for_request_finished

    def _for_register_kv_caches(self, layers: int) -> Sequence[Any]:
        shape = self._shape
        return (
            {
                name: torch.zeros(shape, dtype=torch.int64, device="cpu")
                for name in self._layers[:layers]
            },
        )

    def _for_bind_connector_metadata(self) -> Sequence[Any]:
        return (self._metadata,)

    _for_handle_preemptions = _for_bind_connector_metadata

    def _for_start_load_kv(self) -> Sequence[Any]:
        return (None,)

    _for_set_host_xfer_buffer_ops = _for_start_load_kv
    _for_bind_kv_cache_manager = _for_start_load_kv

    def _for_set_xfer_handshake_metadata_pp_aware(self) -> Sequence[Any]:
        return ({},)

    def _for_wait_for_layer_load(self, layer: int) -> Sequence[Any]:
        return (self._layers[layer],)

    def _for_save_kv_layer(self, layer: int) -> Sequence[Any]:
        return self._layers[layer], None, None

    def _for_get_transfer_results(self, finished: Iterable[str] = ()) -> Sequence[Any]:
        return ({*finished},)

    def _for_get_loaded_kv_cache_group_ids(self) -> Sequence[Any]:
        return (None,)


class Blocks:
    """The blocks of a request, as vLLM's scheduler passes them."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self._ids = tuple([*each] for each in ids)

    def get_block_ids(self) -> tuple[list[int], ...]:
        """Return the ids of each group."""
        return self._ids


def token_of(prompt: int, at: int) -> int:
    """Return a token of a prompt, or of the answer to it; prompts differ from the first one on."""
    return 1000 * prompt + at % 997


# --- the order of hooks


def steps_of(events: Iterable[Event]) -> list[list[Event]]:
    """Return the events of each step, from the first one of the scheduler to its `LAST`.

    The start and the end of an engine are left out, and what comes between steps, such as aborts.
    """
    steps = list[list[Event]]()
    within = False
    for event in events:
        if not within and event.side == SCHEDULER and event.hook in FIRST:
            within = True
            steps.append([])
        if within:
            steps[-1].append(event)
        within = within and event.hook != LAST
    return [step for step in steps if any(each.hook == "build_connector_meta" for each in step)]


#: Hooks with which a scheduler begins a step, or gets a request for it; and the last one of a step.
FIRST = {
    "on_new_request",
    "has_pending_block_frees",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
}
LAST = "take_events"


class Order:
    """The order of the hooks in a trace, by step and by request.

    Attributes:
        always: hooks that each step calls.
        before: pairs of hooks, of which the first one comes before the second one in each step
            that calls both.
        follows: pairs of what happens to a request, and what happens to it next.
        begins, ends: what happens to a request first, and last.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        steps = [[event.hook for event in step] for step in steps_of(events)]
        assert steps
        self.always = set.intersection(*({*step} for step in steps))
        together = set[tuple[str, str]]()
        reverse = set[tuple[str, str]]()
        for step in steps:
            for at, hook in enumerate(step):
                later = {(hook, other) for other in step[at + 1 :] if other != hook}
                together |= later
                reverse |= {(other, one) for one, other in later}
        self.before = together - reverse
        lives = [*lives_of(events).values()]
        self.follows = {pair for life in lives for pair in pairs(life)}
        self.begins = {life[0] for life in lives}
        self.ends = {life[-1] for life in lives}

    def faults(self, events: Sequence[Event], more: set[tuple[str, str]]) -> set[str]:
        """Return in what the order of other events differs.

        ``more``: what may happen to a request too, and its next.
        """
        found = set[str]()
        for step in steps_of(events):
            hooks = [event.hook for event in step]
            found |= {f"a step without {hook}" for hook in self.always.difference(hooks)}
            for at, hook in enumerate(hooks):
                found |= {
                    f"{hook} before {other}"
                    for other in hooks[at + 1 :]
                    if (other, hook) in self.before
                }
        for life in lives_of(events).values():
            unknown = {pair for pair in pairs(life) if pair not in self.follows | more}
            found |= {f"{one}, then {other}" for one, other in unknown}
            if life[0] not in self.begins:
                found.add(f"begins with {life[0]}")
            if life[-1] not in self.ends:
                found.add(f"ends with {life[-1]}")
        return found


def pairs(life: Sequence[str]) -> list[tuple[str, str]]:
    """Return each thing that happens to a request with the next one."""
    return [*itertools.pairwise(life)]


def lives_of(events: Iterable[Event]) -> dict[str, list[str]]:
    """Return what happens to each request, in words. What repeats is there once."""
    lives = dict[str, list[str]]()
    for event in events:
        for name, word in words_of(event):
            life = lives.setdefault(name, [])
            if life[-1:] != [word]:
                life.append(word)
    return lives


def words_of(event: Event) -> list[tuple[str, str]]:
    """Return what an event says of requests."""
    hook = event.hook
    arguments = event.arguments
    if hook == "on_new_request":
        return [(arguments[0], "new")]
    if hook == "get_num_new_matched_tokens":
        tokens, later = event.answer
        return [
            (arguments[0], "to load" if later else "asked later" if tokens is None else "looked up")
        ]
    if hook == "update_state_after_alloc":
        return [(arguments[0], "loads" if arguments[2] else "has blocks")]
    if hook == "build_connector_meta" and arguments:
        new, old, gone = arguments
        words = [(name, "preempted") for name in gone]
        words += [(each[0], "begins") for each in new]
        return words + [(each[0], "resumes" if each[-1] else "runs") for each in old]
    if hook.startswith("request_finished"):
        return [(arguments[0], "retained" if event.answer[0] else "ends")]
    if hook == "get_transfer_results" and event.answer:
        received = event.answer.get("finished_recving", ())
        sent = event.answer.get("finished_sending", ())
        return [(name, "loaded") for name in received] + [(name, "sent") for name in sent]
    return []
