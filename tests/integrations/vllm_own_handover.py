# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for vLLM's own tests of hand-overs: PortaKV's connector replaces NIXL's.

    python -m pytest --noconftest -p vllm_own_handover tests/v1/kv_connector/unit/...

vLLM's schedulers and block pools drive PortaKV's connector and its scheduler side, all unchanged.
Requests carry tickets of a second engine, which computes their prompts by the same classes.
`Worker` stands in for the workers: it moves no rows, and reports what a test reports. Each test
runs in each role that fits it. A test that finds vLLM's scheduler empty also finds the scheduler
side, and the second engine, empty.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import vllm_own_connector

from portakv.integrations import IntegrationError
from portakv.integrations.vllm.connector import EndpointMetadata, PortaKVConnector, ReportMetadata
from portakv.migrate import Ticket
from portakv.serving import Plan, Report
from portakv.serving.handover import Endpoint

UNIT = "tests.v1.kv_connector.unit"
utils: Any = importlib.import_module(f"{UNIT}.utils")

#: Where the workers of all engines listen, so that an engine knows its tickets. Nothing connects.
ENDPOINT = Endpoint("ipc:///nothing-listens-here", b"epoch of caches.")
#: Tokens of a block of the second engine. Those of the tests' engines have 16.
BLOCK = 32
#: Terms of the store that an engine with the role kv_both has too.
STORE = {"host": 1 << 20, "staging": 1 << 20}

PREFILL = "test_remote_prefill_lifecycle"
DECODE = "test_remote_decode_lifecycle"
BIDIRECTIONAL = "test_bidirectional_kv_transfer"
ROLES: Mapping[str, tuple[str, ...]] = {
    PREFILL: ("kv_consumer", "kv_both"),
    DECODE: ("kv_producer", "kv_both"),
    BIDIRECTIONAL: ("kv_producer", "kv_both"),
}
#: The test of a request whose prompt an engine pulls, and offers to another one.
RELAY = "test_multiturn_lifecycle"
#: The function of vLLM's tests that makes such a request.
RELAYED = "_make_p_node_turn2_request"

NO_TICKET = "without a ticket"
NOT_LANDED = "without the end of the pull"
NO_REPORT = "without the report to the scheduler side"
NOT_RETAINED = "without retained blocks"
#: Negative controls: tests that must fail, and the guard that they lack.
CONTROLS = {
    (PREFILL, "test_basic_lifecycle"): (NO_TICKET, NOT_LANDED, NO_REPORT),
    (DECODE, "test_basic_lifecycle"): (NOT_RETAINED,),
}
#: Tests of models whose layers PortaKV does not hand over: it refuses to start.
REFUSED = (
    "test_p_side_chunked_prefill_mamba",
    "test_async_load_does_not_double_reserve_mamba_spec_blocks",
)
#: The argument by which one test takes such layers in some of its cases: a sliding window.
WINDOW = "swa_enabled"
#: Tests that are left out, by the reason.
LEFT_OUT = {
    "NIXL only: an engine pulls rows of more or fewer tokens than the prompt has": (
        "test_remote_blocks_exceed_prompt_tokens",
        "test_p_node_pulls_partial_last_block_from_d",
        "test_partial_remote_tokens_less_than_prompt",
    ),
    "NIXL only: its term kv_recompute_threshold": (
        "test_kv_recompute_threshold_skips_small_transfer",
    ),
    "NIXL only: a decode engine offers prompt and answer to a prefill engine": (
        "test_d_node_request_finished_returns_kv_params",
        "test_d_node_request_finished_delays_block_free",
        "test_d_node_request_finished_remote_num_tokens",
        "test_d_node_partial_last_block_remote_num_tokens",
        "test_d_node_request_finished_exports_blocks_expiry_time",
        "test_remote_num_tokens_bounded_by_blocks",
    ),
    "NIXL only: reads fields of its scheduler or its metadata": (
        "test_abort_p_side_non_length_capped",
        "test_add_new_req_to_recv_populates_remote_meta",
        "test_build_connector_meta_recv_entries",
        "test_build_connector_meta_clears_reqs_need_recv",
        "test_build_connector_meta_multiple_requests",
        "test_no_double_read_blocks_after_reschedule",
        "test_remote_blocks_processed_flag_persists",
    ),
    "NIXL only: tests its worker or its handshake": (
        "test_p_node_pull_kv_from_d",
        "test_p_node_pull_then_send_kv",
        "test_p_node_deferred_pull_on_no_handshake",
        "test_turn2_deadline_gate",
        "test_turn2_full_prefix_hit_with_expired_deadline_skips_gate",
        "test_handshake_listener_appends_perf_counter_frame",
    ),
}


class Variant(NamedTuple):
    """How a test runs.

    Attributes:
        role: ``kv_role`` of the engines that the test makes.
        lacks: the guard that a negative control leaves out; empty: none.
    """

    role: str
    lacks: str = ""

    def __str__(self) -> str:
        return f"{self.role} {self.lacks}".strip()


class Worker:
    """Stands in for the only worker of an engine. It moves nothing; tests say what has ended.

    Attributes:
        pulls: numbers of the pulls that have begun and not ended, by request.
        offers: the requests whose rows are offered, by the name of the offer.
        retained: the requests whose blocks the engine keeps.
        shown: the blocks that a test sees of a request that has ended, until a plan offers them.
        released: tickets that the other engine needs to keep no longer.
    """

    def __init__(self) -> None:
        self.pulls = dict[str, int]()
        self.offers = dict[bytes, str]()
        self.retained = set[str]()
        self.shown = dict[str, Any]()
        self.released = set[bytes]()

    def begin(self, plan: Plan) -> Report:
        """Begin what a plan says. Return the report of the saves, which end immediately."""
        report = Report()
        for save in plan.saves:
            report.released[save.number] += 1
            report.end(save.number)

        for pull in plan.handovers.pulls:
            assert pull.request not in self.pulls, "a request pulls its rows twice"
            self.pulls[pull.request] = pull.number

        for offer in plan.handovers.offers:
            assert offer.blocks == self.shown.pop(offer.request), "other blocks are offered"
            self.offers[offer.name] = offer.request

        self.retained |= {*plan.retained}
        self.released |= {*plan.handovers.released}
        return report

    def report(self, pulled: Sequence[str], sent: Sequence[str], lacks: str) -> Report:
        """Return the report of a step in which a test says that pulls and offers have ended."""
        report = Report()
        for request in pulled:
            assert request in self.pulls, f"no pull of {request} has begun"
            number = self.pulls.pop(request)
            if lacks != NO_REPORT:
                report.end(number)

        offering = {request: name for name, request in self.offers.items()}
        for request in sent:
            assert request in self.retained, f"the blocks of {request} were not retained"
            self.retained.remove(request)
            del self.offers[offering[request]]
            report.offers["taken"] += 1
        return report


class Engine(PortaKVConnector):
    """PortaKV's connector in an engine whose worker is a `Worker`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.worker = Worker()
        handing = self._settings.handing
        if handing is not None and handing.offers:
            self.set_xfer_handshake_metadata_pp_aware({(0, 0): EndpointMetadata(ENDPOINT)})
        case.engines.append(self)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        self.scheduler_side.take(self.worker.begin(metadata.plan))
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        if case.variant.lacks == NOT_LANDED:
            connector_output.finished_recving = None  # vLLM reads it after this call
        pulled = [*(connector_output.finished_recving or ())]
        sent = [*(connector_output.finished_sending or ())]
        report = self.worker.report(pulled, sent, case.variant.lacks)
        output = replace(connector_output, kv_connector_worker_meta=ReportMetadata(report))
        super().update_connector_output(output)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        retained, params = super().request_finished(request, block_ids)
        if params is not None:
            # NIXL's key for the blocks. The worker checks that the plan offers these.
            blocks = tuple(tuple(ids) for ids in block_ids)
            self.worker.shown[request.request_id] = blocks
            params = {**params, "remote_block_ids": blocks}
        return retained and case.variant.lacks != NOT_RETAINED, params

    request_finished_all_groups = request_finished


class Prefill:
    """A second engine, which computes the prompts with which the engine of a test goes on."""

    def __init__(self) -> None:
        terms = {"kv_role": "kv_producer", "block_size": BLOCK, "max_num_batched_tokens": 1024}
        self.scheduler = utils.create_scheduler(create_vllm_config(**terms))

    def compute(self, request: Any) -> Any:
        """Compute the prompt of a request; return what the request carries to its decode engine."""
        twin = utils.Request(
            request_id=request.request_id,
            prompt_token_ids=[*request.prompt_token_ids],
            sampling_params=utils.SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=utils.get_request_block_hasher(BLOCK, utils.sha256),
        )
        twin.kv_transfer_params = {"do_remote_decode": True, "do_remote_prefill": False}
        self.scheduler.add_request(twin)
        outputs = self._step([twin])
        (output,) = outputs[0].outputs
        params = {**output.kv_transfer_params}
        del params["remote_block_ids"]  # no key of PortaKV's
        return json.loads(json.dumps(params))  # as a proxy passes it on

    def end(self, released: set[bytes]) -> None:
        """End the offers whose tickets the other engine has released."""
        self._step([])  # the worker learns of offers
        offers = self.scheduler.connector.worker.offers
        tickets = {
            request: Ticket.of(ENDPOINT.address, ENDPOINT.epoch, name)
            for name, request in offers.items()
        }
        sent = {request for request, ticket in tickets.items() if ticket in released}
        self._step([], finished_sending=sent)
        self._step([])

    def _step(self, requests: list[Any], **ended: Any) -> Any:
        output = self.scheduler.schedule()
        result = utils.create_model_runner_output(requests, **ended)
        return self.scheduler.update_from_output(output, result)


@dataclass
class Case:
    """The state of a test.

    Attributes:
        engines: connectors that were made.
        prefill: the second engine, once a request needs it.
    """

    variant: Variant
    engines: list[Engine] = field(default_factory=list)
    prefill: Prefill | None = None

    def worker_side(self, request: Any) -> Any:
        """Return what a request carries whose prompt the second engine has computed."""
        if self.prefill is None:
            self.prefill = Prefill()
        return self.prefill.compute(request)


case = Case(Variant("kv_both"))
make_config: Callable[..., Any] = utils.create_vllm_config
make_request: Callable[..., Any] = utils.create_request
assert_empty_scheduler: Callable[[Any], None] = utils.assert_scheduler_empty


def create_vllm_config(**named: Any) -> Any:
    """Return a configuration of PortaKV's connector for hand-overs, without terms of NIXL's."""
    role = named.pop("kv_role", case.variant.role)
    extra = {"hand_over": {}, **(STORE if role == "kv_both" else {})}
    named.update(kv_role=role, kv_connector_extra_config=extra)
    named.update(kv_connector="Engine", kv_connector_module_path=__name__)
    config = make_config(**named)
    config.parallel_config.distributed_executor_backend = "uni"  # no server of a store
    return config


def create_request(**named: Any) -> Any:
    """Return a request; it carries a ticket if another engine has computed its prompt."""
    request = make_request(**named)
    if named.get("do_remote_prefill") and case.variant.lacks != NO_TICKET:
        request.kv_transfer_params = case.worker_side(request)
    return request


def assert_scheduler_empty(scheduler: Any) -> None:
    """Check that nothing is left of requests: in vLLM, the scheduler side and the second engine."""
    assert_empty_scheduler(scheduler)
    engine = scheduler.connector
    counts = engine.statistics()
    assert (counts["requests"], counts["jobs"]) == (0, 0)
    assert not engine.worker.shown, "a test saw blocks that no plan offers"
    if case.prefill is not None:
        case.prefill.end(engine.worker.released)
        assert_empty_scheduler(case.prefill.scheduler)


def relayed(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes requests whose prompts an engine pulls, and offers again."""

    def made(*terms: Any, **named: Any) -> Any:
        request = make(*terms, **named)
        request.kv_transfer_params = {**case.worker_side(request), "do_remote_decode": True}
        return request

    return made


def variants_of(module: str, test: str) -> list[Variant]:
    """Return how a test runs."""
    roles = ROLES[module]
    if test == RELAY or test in chain.from_iterable(LEFT_OUT.values()):
        roles = roles[-1:]
    controls = [Variant(roles[0], lacks) for lacks in CONTROLS.get((module, test), ())]
    return [*map(Variant, roles), *controls]


def pytest_configure() -> None:
    """Put PortaKV in its place before a test module takes another connector."""
    vllm_own_connector.write_model()
    utils.create_vllm_config = create_vllm_config
    utils.create_request = create_request
    utils.assert_scheduler_empty = assert_scheduler_empty

    # The real module needs ray. Only tests that are left out use what it has.
    fakes: Any = ModuleType(f"{UNIT}.test_nixl_connector")
    fakes.FakeNixlWrapper = object
    fakes.FakeNixlConnectorWorker = type("Fake", (), {"REMOTE_ENGINE_ID": "remote"})
    sys.modules[fakes.__name__] = fakes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test in the roles that fit it, and as a negative control."""
    module = metafunc.module.__name__.rpartition(".")[2]
    variants = variants_of(module, metafunc.function.__name__)
    metafunc.parametrize("variant", variants, indirect=True, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are left out, those that PortaKV refuses, and the negative controls."""
    reasons = {name: reason for reason, names in LEFT_OUT.items() for name in names}
    functions = [item for item in items if isinstance(item, pytest.Function)]
    gone = {*reasons}.difference(function.originalname for function in functions)
    if gone and any(BIDIRECTIONAL in item.nodeid for item in items):
        raise pytest.UsageError(f"Expected vLLM to have {sorted(gone)}. Correct LEFT_OUT.")

    for item in functions:
        variant = item.callspec.params["variant"]
        assert isinstance(variant, Variant)
        reason = reasons.get(item.originalname)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.originalname in REFUSED or item.callspec.params.get(WINDOW):
            why = "PortaKV refuses these layers at the start, by name"
            item.add_marker(pytest.mark.xfail(raises=IntegrationError, strict=True, reason=why))
        elif variant.lacks:
            why = f"negative control, {variant.lacks}"
            item.add_marker(pytest.mark.xfail(raises=AssertionError, strict=True, reason=why))


@pytest.fixture(autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test in a role, and close its engines."""
    global case
    case = Case(request.param)
    if request.node.originalname == RELAY:
        make = getattr(request.module, RELAYED)
        monkeypatch.setattr(request.module, RELAYED, relayed(make))
    yield
    for engine in case.engines:
        engine.shutdown()
