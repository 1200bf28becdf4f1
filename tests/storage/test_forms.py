# SPDX-License-Identifier: Apache-2.0
"""Several forms in one store: which bytes come back, what goes for what, what a store reports."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from support.core_cases import noise
from support.storage_cases import FakeTier, counts_of, key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, LayoutError, SlotError, StoreError, TransferError
from portakv.graph import Collector
from portakv.storage import BlockForm, BlockStore, Disk, Remote
from portakv.storage.store import FormStore, lie_alike, load_together

KEYS = [key_of(i) for i in range(12)]
BLOCKS = range(12)
WINDOW = small_form(layers=2, notes="the layers with a window")
#: An attention group, two ranks of another one, and blocks of other sizes.
FORMS = {
    "full": small_form(),
    "window": replace(WINDOW, heads=(0, 2, 4)),
    "rank 1": replace(WINDOW, heads=(2, 4, 4)),
    "long": small_form(block_size=16),
    "wide": small_form(widths=(256, 256), model="org/other@1"),
}
SIZE = max(form.image_bytes for form in FORMS.values())


def cache_of(
    form: BlockForm, seed: int = 0, blocks: int = 12, device: torch.device | str = "cpu"
) -> KVView:
    """Return a paged cache that holds the layers and heads of a form, with a separate content."""
    heads = form.heads[1] - form.heads[0]
    shape = (blocks, 2, form.block_size, heads, form.widths[0])
    seed += int.from_bytes(form.digest[:2], "little")
    layers = range(form.layers[1] - form.layers[0])
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in layers]
    return KVView([each.to(device) for each in tensors], "layer | block kv token head dim")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return float16 as int16, which compares equal also where it is not a number."""
    return tensor.cpu().contiguous().view(torch.int16)


def pairs_of(one: KVView, other: KVView) -> Any:
    return zip(one.tensors, other.tensors, strict=True)


def equal(one: KVView, other: KVView) -> list[bool]:
    """Return for each block whether two caches have the same bytes there."""
    pairs = [(bits(a), bits(b)) for a, b in pairs_of(one, other)]
    return [all(torch.equal(a[i], b[i]) for a, b in pairs) for i in range(len(one.tensors[0]))]


def opened(forms: Any = None, staging: int = 24, host: int = 0, **terms: Any) -> BlockStore:
    terms = {"full": "wait", **terms}
    return BlockStore(forms or FORMS, staging=staging * SIZE, host=host * SIZE, **terms)


def tiers_in(kind: str, folder: Path) -> list[Any]:
    kinds: dict[str, Any] = {
        "host": list,
        "fake": lambda: [FakeTier()],
        "disk": lambda: [Disk(folder / "one", folder / "two", capacity=16 << 20, io="threads")],
        "remote": lambda: [Remote("memory://")],
        "both": lambda: [Disk(folder, capacity=16 << 20, io="threads"), Remote("memory://")],
    }
    return [*kinds[kind]()]


def save(store: FormStore, many: int = 12, seed: int = 0) -> None:
    blocks = range(many)
    store.save(cache_of(store.form, seed), blocks, KEYS[:many]).synchronize(LIMIT)


def loaded(store: FormStore, **terms: Any) -> tuple[list[bool], list[bool]]:
    """Load all keys; return which blocks landed, and which have the bytes of `save`."""
    target = cache_of(store.form, 1000)
    handle = store.load(target, BLOCKS, KEYS, missing="skip", **terms)
    handle.synchronize(LIMIT)
    landed = [bool(each) for each in handle.landed]
    untouched = equal(target, cache_of(store.form, 1000))
    assert all(x or y for x, y in zip(landed, untouched, strict=True))
    return landed, equal(target, cache_of(store.form))


# --- bytes ---


@pytest.mark.parametrize("kind", ["host", "fake", "disk", "remote", "both"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_each_form_has_its_own_blocks_under_the_same_keys(
    kind: str, by_layer: bool, tmp_path: Path
) -> None:
    host = 80 if kind == "host" else 0
    with opened(host=host, tiers=tiers_in(kind, tmp_path)) as store:
        for name in FORMS:
            save(store.of(name))
        for name in FORMS:
            assert store.of(name).lookup(KEYS) == 12
            landed, right = loaded(store.of(name), by_layer=by_layer)
            assert landed == right == [True] * 12


#: Groups of layers in one memory, as vLLM gives it to them.
ALIKE = {"full": FORMS["full"], "window": small_form(notes="the layers with a window")}


@pytest.mark.parametrize("present", [True, False])
def test_forms_that_lie_alike_are_loaded_together(present: bool) -> None:
    """All blocks come, or no byte does: the control lacks one in the host tier."""
    full, window = (cache_of(form) for form in ALIKE.values())
    target, untouched = (cache_of(ALIKE["full"], 1000) for _ in range(2))
    with opened(ALIKE, host=20) as store:
        one, other = (store.of(name) for name in ALIKE)
        one.save(full, range(4), KEYS[:4]).synchronize(LIMIT)
        other.save(window, range(4), KEYS[:4]).synchronize(LIMIT)
        lacking = KEYS[3] if present else KEYS[5]
        loads = [(one, (7, 4), [KEYS[2], lacking]), (other, (9,), KEYS[:1])]
        handle = load_together(target, loads)
        assert (handle is not None) is present
        if handle is None:
            assert all(equal(target, untouched))
            return
        handle.synchronize(LIMIT)
        assert handle.landed.tolist() == [True] * 3
    assert [n for n, same in enumerate(equal(target, untouched)) if not same] == [4, 7, 9]
    for came, rows, others in zip(target.tensors, full.tensors, window.tensors, strict=True):
        assert torch.equal(bits(came[7]), bits(rows[2]))
        assert torch.equal(bits(came[4]), bits(rows[3]))
        assert torch.equal(bits(came[9]), bits(others[0]))


def test_a_block_of_two_forms_is_refused() -> None:
    with opened(ALIKE, host=20) as store:
        for name, form in ALIKE.items():
            store.of(name).save(cache_of(form), range(4), KEYS[:4]).synchronize(LIMIT)
        loads = [(store.of(name), (3,), KEYS[:1]) for name in ALIKE]
        with pytest.raises(SlotError, match="blocks"):
            load_together(cache_of(ALIKE["full"]), loads)


@pytest.mark.parametrize("name", ["window", "rank 1", "long", "wide"])
def test_other_forms_do_not_lie_alike(name: str) -> None:
    with opened(host=4) as store, opened(host=4) as other:
        assert lie_alike(store.of("full"), store.of("full"))
        assert not lie_alike(store.of("full"), store.of(name))
        assert not lie_alike(store.of("full"), other.of("full"))


def others_that_have(store: BlockStore, name: str) -> set[str]:
    """Return the other forms that have a block of those saved under one form, in any way."""
    result = set[str]()
    for other in {*store.forms} - {name}:
        one = store.of(other)
        one.prefetch(KEYS[:4]).synchronize(LIMIT)
        if one.lookup(KEYS) or any(map(one.has, KEYS)) or any(loaded(one)[0]):
            result.add(other)
    return result


@pytest.mark.parametrize("kind", ["host", "fake", "disk", "remote"])
def test_a_key_of_one_form_is_not_there_under_another(kind: str, tmp_path: Path) -> None:
    with opened(host=40, tiers=tiers_in(kind, tmp_path)) as store:
        save(store.of("full"))
        assert others_that_have(store, "full") == set()
        assert all(loaded(store.of("full"))[1])


def test_keys_without_their_form_are_there_under_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test before."""
    monkeypatch.setattr(
        "portakv.storage.calls.FormPart.names", lambda self, keys: [bytes(16) + key for key in keys]
    )
    with opened(host=40) as store:
        save(store.of("full"))
        assert others_that_have(store, "full")


def test_a_prefetch_and_a_load_of_one_form_leave_the_other_alone(tmp_path: Path) -> None:
    """Also while both bring the same keys."""
    with opened(tiers=tiers_in("disk", tmp_path)) as store:
        for name in FORMS:
            save(store.of(name))
    with opened(host=40, tiers=tiers_in("disk", tmp_path)) as store:
        targets = {name: cache_of(form, 1000) for name, form in FORMS.items()}
        handles = [store.of(name).prefetch(KEYS[:2]) for name in FORMS]
        for name in FORMS:
            handles.append(store.of(name).load(targets[name], BLOCKS, KEYS))
        for handle in handles:
            handle.synchronize(LIMIT)
        for name, form in FORMS.items():
            assert all(equal(targets[name], cache_of(form)))


def test_a_view_of_another_block_size_loads_the_blocks_of_either(tmp_path: Path) -> None:
    with opened(host=80) as store:
        save(store.of("full"))
        save(store.of("long"))
        wide = cache_of(replace(FORMS["full"], block_size=8), 5)
        store.of("full").load(wide, range(6), KEYS).synchronize(LIMIT)
        tokens = [x.transpose(0, 1).reshape(2, 96, 2, 32) for x in wide.tensors]
        saved = [
            x[:12].transpose(0, 1).reshape(2, 48, 2, 32) for x in cache_of(FORMS["full"]).tensors
        ]
        assert all(
            torch.equal(bits(a[:, :48]), bits(b)) for a, b in zip(tokens, saved, strict=True)
        )
        store.of("long").load(wide, range(12), KEYS[:6]).synchronize(LIMIT)
        tokens = [x.transpose(0, 1).reshape(2, 96, 2, 32) for x in wide.tensors]
        saved = [
            x[:6].transpose(0, 1).reshape(2, 96, 2, 32) for x in cache_of(FORMS["long"]).tensors
        ]
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tokens, saved, strict=True))


def test_a_form_reads_the_blocks_of_another_part_of_the_same_cache() -> None:
    """As a store of one form does, of what it finds in a tier."""
    whole = small_form(heads=4)
    half = replace(whole, heads=(2, 4, 4))
    tier = FakeTier()
    with opened({"whole": whole, "half": half}, host=40, tiers=[tier]) as store:
        save(store.of("whole"))
        target = cache_of(half, 1000)
        assert store.of("half").lookup(KEYS) == 12
        store.of("half").load(target, BLOCKS, KEYS).synchronize(LIMIT)
        pairs = pairs_of(target, cache_of(whole))
        assert all(torch.equal(bits(a), bits(b[:, :, :, 2:])) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_forms_of_a_device_have_their_own_blocks(kind: str, by_layer: bool, tmp_path: Path) -> None:
    """Saves and host hits are issued in this thread, on one stream for all forms."""
    device = torch.device("cuda", 0)
    host = 80 if kind == "host" else 30
    with opened(host=host, tiers=tiers_in(kind, tmp_path)) as store:
        targets = {}
        for name, form in FORMS.items():
            store.of(name).save(cache_of(form, device=device), BLOCKS, KEYS).synchronize(LIMIT)
        for name, form in FORMS.items():
            targets[name] = cache_of(form, 1000, device=device)
            store.of(name).load(targets[name], BLOCKS, KEYS, by_layer=by_layer).wait()
        torch.accelerator.synchronize()
        for name, form in FORMS.items():
            assert all(equal(targets[name], cache_of(form)))


# --- a restart ---


@pytest.mark.parametrize("kind", ["disk", "both"])
def test_forms_are_known_by_what_they_are_after_a_restart(kind: str, tmp_path: Path) -> None:
    """Not by their names, which another process gives to others, and not by their order."""
    with opened(tiers=tiers_in(kind, tmp_path)) as store:
        for name in FORMS:
            save(store.of(name))
    turned = dict(zip(FORMS, [*FORMS.values()][::-1], strict=True))
    with opened(turned, tiers=tiers_in(kind, tmp_path)) as store:
        assert "is here in blocks" not in store.explain(), "the store has both block sizes"
        for name in turned:
            assert loaded(store.of(name)) == ([True] * 12, [True] * 12)
    for form in FORMS.values():
        with opened(form, tiers=tiers_in(kind, tmp_path)) as store:
            assert loaded(store) == ([True] * 12, [True] * 12)


def test_a_disk_serves_no_block_of_another_form_whose_files_were_exchanged(tmp_path: Path) -> None:
    one = small_form()
    two = small_form(notes="another group")
    forms = {"one": one, "two": two}
    with opened(forms, tiers=[Disk(tmp_path, capacity=1 << 20, io="threads")]) as store:
        save(store.of("one"))
        save(store.of("two"))
    for name in ("slots", "table"):
        (tmp_path / one.name / name).rename(tmp_path / "kept")
        (tmp_path / two.name / name).rename(tmp_path / one.name / name)
        (tmp_path / "kept").rename(tmp_path / two.name / name)
    with opened(forms, tiers=[Disk(tmp_path, capacity=1 << 20, io="threads")]) as store:
        assert not any(loaded(store.of("one"))[0])
        assert not any(loaded(store.of("two"))[0])


def test_a_process_has_a_folder_until_all_of_its_forms_are_closed(tmp_path: Path) -> None:
    store = opened(tiers=tiers_in("disk", tmp_path))
    try:
        for form in FORMS.values():
            with pytest.raises(StoreError, match="this process"):
                opened(form, tiers=tiers_in("disk", tmp_path))
    finally:
        store.close()
    opened(tiers=tiers_in("disk", tmp_path)).close()


# --- memory and space that forms share ---


def test_the_host_tier_evicts_the_least_recently_used_block_of_any_form() -> None:
    with opened(host=12, tiers=[FakeTier()]) as store:
        full = store.of("full")
        window = store.of("window")
        save(full, 8)
        save(window, 4)
        cached = {"full": 8, "window": 4}
        assert {name: len(store.of(name).keys().keys["host"]) for name in cached} == cached
        full.load(cache_of(full.form, 9), range(4), KEYS[:4]).synchronize(LIMIT)
        save(store.of("wide"), 8)
        for name, left in {"full": KEYS[:4], "window": [], "wide": KEYS[:8]}.items():
            assert sorted(store.of(name).keys().keys["host"]) == sorted(left)
        assert counts_of(store.rows)["kept"] == 12


def test_a_call_may_evict_the_same_keys_of_another_form() -> None:
    """They are no earlier blocks of the call."""
    with opened(host=6, tiers=[FakeTier()]) as store:
        save(store.of("full"), 6)
        save(store.of("window"), 6)
        assert sorted(store.of("window").keys().keys["host"]) == sorted(KEYS[:6])
        assert store.of("full").keys().keys["host"] == []


def test_forms_share_staging() -> None:
    tier = FakeTier()
    tier.hold = threading.Event()
    with opened(staging=4, full="drop", tiers=[tier]) as store:
        first = store.of("full").save(cache_of(FORMS["full"]), [0, 1], KEYS[:2])
        second = store.of("window").save(cache_of(FORMS["window"]), [0], KEYS[:1])
        with pytest.raises(TransferError, match="staging was full"):
            second.synchronize(LIMIT)
        tier.hold.set()
        first.synchronize(LIMIT)


def disk_of(folder: Path, blocks: int) -> list[Disk]:
    capacity = blocks * FORMS["full"].image_bytes
    return [Disk(folder, capacity=capacity, io="threads")]


def on_disk(store: FormStore, numbers: range) -> int:
    return sum(store.has(key_of(number)) for number in numbers)


def grow(store: FormStore, numbers: range) -> None:
    """Save prompts of one block each."""
    view = cache_of(store.form)
    for number in numbers:
        store.save(view, [0], [key_of(number)]).wait()


def test_each_form_is_offered_twice(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capacity=16 << 20, admit="second", io="threads")
    with opened(tiers=[disk]) as store:
        for there in (0, 12):
            for name in FORMS:
                save(store.of(name))
                assert store.of(name).lookup(KEYS) == there


PAIR = {"full": small_form(), "other": small_form(notes="another group")}


def test_a_form_takes_the_space_of_one_that_is_not_used(tmp_path: Path) -> None:
    with opened(PAIR, tiers=disk_of(tmp_path, 64)) as store:
        full = store.of("full")
        other = store.of("other")
        grow(full, range(64))
        assert on_disk(full, range(64)) == 64
        grow(other, range(100, 300))
        assert on_disk(other, range(100, 300)) > 56
        assert on_disk(other, range(300 - 40, 300)) == 40
        sizes = [path.stat().st_size for path in tmp_path.rglob("slots")]
        assert sum(sizes) <= 64 * FORMS["full"].image_bytes
        view = cache_of(full.form, 1000)
        left = [number for number in range(64) if full.has(key_of(number))]
        full.load(view, range(len(left)), [key_of(number) for number in left]).synchronize(LIMIT)


def test_forms_that_are_used_alike_share_the_space(tmp_path: Path) -> None:
    with opened(PAIR, tiers=disk_of(tmp_path, 64)) as store:
        for number in range(0, 200, 4):
            grow(store.of("full"), range(number, number + 4))
            grow(store.of("other"), range(number, number + 4))
        counts = [on_disk(store.of(name), range(200)) for name in PAIR]
        assert min(counts) >= 20
        # What was used last is there: forms do not take slots from each other in turns.
        assert all(on_disk(store.of(name), range(188, 200)) == 12 for name in PAIR)


def test_a_save_of_one_form_is_no_use_of_the_same_keys_of_another(tmp_path: Path) -> None:
    with opened(PAIR, tiers=disk_of(tmp_path, 20)) as store:
        full = store.of("full")
        other = store.of("other")
        grow(full, range(16))
        grow(other, range(4))
        grow(full, range(16, 20))
        assert on_disk(full, range(4)) == 0
        assert on_disk(full, range(4, 20)) == 16
        assert on_disk(other, range(4)) == 4


def test_a_restart_gives_no_form_the_space_of_another(tmp_path: Path) -> None:
    """No form counts as older than another one then, in any folder."""
    folders = [tmp_path / "a", tmp_path / "b"]
    capacity = 64 * FORMS["full"].image_bytes
    with opened(PAIR, tiers=[Disk(*folders, capacity=capacity, io="threads")]) as store:
        for number in range(32):
            for name in PAIR:
                grow(store.of(name), range(number, number + 1))
        assert [on_disk(store.of(name), range(32)) for name in PAIR] == [32, 32]
    with opened(PAIR, tiers=[Disk(*folders, capacity=capacity, io="threads")]) as store:
        grow(store.of("other"), range(100, 116))
        grow(store.of("full"), range(100, 104))
        assert on_disk(store.of("full"), range(32)) == 28
        assert on_disk(store.of("other"), range(100, 116)) == 16


def test_forms_fit_into_a_smaller_capacity(tmp_path: Path) -> None:
    with opened(PAIR, tiers=disk_of(tmp_path, 64)) as store:
        grow(store.of("full"), range(32))
        grow(store.of("other"), range(32))
    with opened(PAIR, tiers=disk_of(tmp_path, 40)) as store:
        grow(store.of("full"), range(100, 101))
        sizes = [path.stat().st_size for path in tmp_path.rglob("slots")]
        assert sum(sizes) <= 40 * FORMS["full"].image_bytes
        assert min(on_disk(store.of(name), range(101)) for name in PAIR) > 10


@pytest.mark.parametrize("seed", range(4))
def test_any_calls_bring_right_bytes_or_nothing(seed: int, tmp_path: Path) -> None:
    """Saves, loads and prefetches of all forms, where nothing has room for all, and restarts."""
    choice = random.Random(seed)
    caches = {name: cache_of(form) for name, form in FORMS.items()}
    for _ in range(3):
        disk = Disk(tmp_path / "a", tmp_path / "b", capacity=24 * SIZE, io="threads")
        with opened(host=7, staging=12, tiers=[disk]) as store:
            handles = []
            for _ in range(40):
                name = choice.choice([*FORMS])
                first = choice.randrange(10)
                at = range(first, choice.randint(first + 1, 12))
                keys = [KEYS[i] for i in at]
                one = store.of(name)
                act = choice.random()
                if act < 0.45:
                    handles.append(one.save(caches[name], at, keys))
                elif act < 0.55:
                    handles.append(one.prefetch(keys))
                else:
                    target = cache_of(FORMS[name], 1000)
                    handle = one.load(target, at, keys, missing="skip")
                    handle.synchronize(LIMIT)
                    right = equal(target, caches[name])
                    landed = zip(at, handle.landed, strict=True)
                    assert all(right[i] for i, there in landed if there)
            for handle in handles:
                with suppress(TransferError):  # other blocks took the place of some
                    handle.synchronize(LIMIT)


# --- what a store reports ---


def test_figures_name_the_form(tmp_path: Path) -> None:
    with opened(host=20, tiers=tiers_in("disk", tmp_path)) as store:
        save(store.of("full"), 3)
        loaded(store.of("full"))
        store.of("window").load(cache_of(FORMS["window"]), [0], KEYS[:1], missing="skip").wait()
        figures = store.statistics()
        moved = {
            (x["form"], x["tier"], x["op"], x["result"]): x["value"]
            for x in figures["form_blocks_total"]
        }
        assert moved == {("full", "disk", "save", "hit"): 3, ("full", "host", "load", "hit"): 3}
        assert [x["form"] for x in figures["tiers"]] == [*FORMS]
        host = {x["form"]: x["value"] for x in figures["host_form_bytes"]}
        assert host == {name: 3 * SIZE if name == "full" else 0 for name in FORMS}
        nbytes = [x for x in figures["form_bytes_total"] if x["tier"] == "disk"]
        image = FORMS["full"].image_bytes
        assert nbytes == [{"form": "full", "tier": "disk", "op": "save", "value": 3 * image}]
        registry = CollectorRegistry()
        registry.register(Collector(store))
        text = generate_latest(registry).decode()
        sample = 'portakv_form_blocks_total{form="full",op="save",result="hit",tier="disk"} 3.0'
        assert sample in text
        assert 'portakv_host_form_bytes{form="window"} 0.0' in text


def test_a_store_of_one_form_without_a_name_has_no_figures_by_form() -> None:
    with opened(FORMS["full"], host=20) as store:
        save(store)
        loaded(store)
        assert not [name for name in store.statistics() if "form" in name]
        assert store.forms == {"": FORMS["full"]}


def test_handles_and_changes_name_the_form() -> None:
    with opened(host=40, tiers=[FakeTier()]) as store:
        assert store.finished() == []
        assert store.listen() == []
        handles = []
        for name in ("full", "window"):
            one = store.of(name)
            saved = one.save(cache_of(one.form), [0, 1], KEYS[:2])
            saved.synchronize(LIMIT)
            loads = one.load(cache_of(one.form, 9), [0, 1], KEYS[:2])
            loads.synchronize(LIMIT)
            fetched = one.prefetch(KEYS[:1])
            fetched.synchronize(LIMIT)
            handles += [saved, loads, fetched]
            assert [handle.form for handle in (saved, loads, fetched)] == [name] * 3
        ended = store.finished()
        while len(ended) < 6:
            ended += store.finished()
        assert {*ended} == {*handles}
        changes = store.listen()
        named = sorted((change.form, change.key) for change in changes)
        assert named == [(name, key) for name in ("full", "window") for key in KEYS[:2]]
        assert [change.number for change in changes] == [1, 2, 3, 4]
        snapshot = store.of("full").keys()
        assert (snapshot.number, sorted(snapshot.keys["host"])) == (4, KEYS[:2])
        assert store.of("wide").keys().keys == {"host": []}


def test_explain_describes_each_form() -> None:
    with opened(host=4) as store:
        text = store.explain()
        assert f"Blocks of wide of {FORMS['wide'].payload_bytes} bytes" in text
        part = f"A block of window takes {FORMS['window'].image_bytes} of the {SIZE} bytes of a row"
        assert part in text
        assert "A block of wide takes" not in text


# --- errors ---


@pytest.fixture
def store() -> Iterator[BlockStore]:
    with opened(host=20) as store:
        yield store


def test_a_call_needs_one_of_several_forms(store: BlockStore) -> None:
    view = cache_of(FORMS["full"])
    calls: list[Any] = [
        lambda: store.save(view, [0], KEYS[:1]),
        lambda: store.load(view, [0], KEYS[:1]),
        lambda: store.prefetch(KEYS[:1]),
        lambda: store.lookup(KEYS),
        lambda: store.has(KEYS[0]),
        store.keys,
        lambda: store.form,
    ]
    for call in calls:
        with pytest.raises(InvalidTerms, match=r"store\.of\('full'\)"):
            call()
    assert store.forms == FORMS
    assert store.of("full") is store.of("full")
    with pytest.raises(InvalidTerms, match="Did you mean 'full'"):
        store.of("ful")


def test_a_view_of_another_form_is_refused(store: BlockStore) -> None:
    with pytest.raises(LayoutError):
        store.of("full").save(cache_of(FORMS["wide"]), [0], KEYS[:1])


@pytest.mark.parametrize(
    ("forms", "text"),
    [
        ({"a": small_form(), "b": small_form()}, r"form\['b'\] equal to form\['a'\]"),
        ({}, "forms by their names"),
        ({"a": 1}, r"form\['a'\]"),
        ({"": small_form()}, "a name in form"),
        ({1: small_form()}, "a name in form"),
    ],
)
def test_forms_are_checked(forms: Any, text: str) -> None:
    with pytest.raises(InvalidTerms, match=text):
        BlockStore(forms, staging=1 << 20, host=1 << 20)


def test_a_mapping_may_have_one_form() -> None:
    with opened({"only": FORMS["full"]}, host=20) as store:
        save(store)
        assert loaded(store.of("only"))[1] == [True] * 12
        assert {change.form for change in [*store.listen()]} <= {"only"}
        assert len(store.keys().keys["host"]) == 12


class OneForm(FakeTier):
    """A tier of a release that knew one form for each store."""

    def open(self, graph: Any, rows: Any, forms: Any) -> Any:  # type: ignore[override]
        return super().open(graph, rows, forms)


def test_a_tier_that_opens_one_form_serves_stores_of_one() -> None:
    with pytest.raises(InvalidTerms, match="opens several forms"):
        opened(tiers=[OneForm()])
    with opened({"only": FORMS["full"]}, tiers=[OneForm()]) as store:
        save(store)
        assert all(loaded(store)[1])


def test_a_closed_store_ends_its_forms() -> None:
    store = opened(host=20)
    one = store.of("full")
    store.close()
    with pytest.raises(StoreError, match="open store"):
        one.lookup(KEYS)
    assert one.form == FORMS["full"]


def test_a_disk_has_no_folder_twice(tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path)
    for again in (tmp_path, tmp_path / ".", tmp_path / "other"):
        with pytest.raises(InvalidTerms, match="different folders"):
            Disk(tmp_path, again, capacity=1 << 20)
