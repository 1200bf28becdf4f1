# SPDX-License-Identifier: Apache-2.0
"""Prefixes of the real transformers in a store: they survive the process, or are computed again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.ambient import STATES, State
from support.engine_process import answer
from support.guarded_memory import refused
from support.held_bucket import HeldBucket, TermsWith
from support.waits import LIMIT
from transformers import DynamicCache

from portakv import LayoutError
from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.integrations.transformers.caches import OffloadedCache, cache_argument
from portakv.integrations.transformers.store import PrefixStore
from portakv.serving import StoreTerms

SIZE = 8
ROOM: dict[str, Any] = {"host": 1 << 20, "staging": 2 << 20, "block_size": SIZE}
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # wide enough that the answer depends on the whole prompt
    "pad_token_id": 0,
    "eos_token_id": None,
}


def small(kind: str = "Llama", seed: int = 0, **more: Any) -> Any:
    """A model of three layers on the host; the same for the same seed."""
    config = getattr(transformers, f"{kind}Config")(**CONFIG | more)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    made = tmp_path / "store"
    made.mkdir(mode=0o700)
    return str(made)


@pytest.fixture
def store(model: Any, folder: str) -> Iterator[PrefixStore]:
    with PrefixStore(model, {"folder": folder, "capacity": 4 << 20, **ROOM}) as made:
        yield made


def prompt(batch: int = 1, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """The prompts and nine greedy tokens after them."""
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    options[cache_argument(model)] = cache
    output: torch.Tensor = model.generate(tokens, **options)
    return output


def put(store: PrefixStore, cache: Any, tokens: torch.Tensor, **more: Any) -> None:
    for transfer in store.save(cache, tokens, **more):
        transfer.synchronize(timeout=LIMIT)


def computed(model: Any, tokens: torch.Tensor, cache: Any = None) -> Any:
    """A cache with the rows of prompts."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(tokens, **{cache_argument(model): cache})
    return cache


@pytest.mark.parametrize("kind", [DynamicCache, OffloadedCache])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_and_its_next_turn(
    model: Any, store: PrefixStore, batch: int, kind: type[Any]
) -> None:
    """The first turn is computed; the second one loads the first with its answer."""
    tokens = prompt(batch)
    first = store.load(tokens, torch.ones_like(tokens), cache=kind(config=model.config))
    assert first.get_seq_length() == 0
    output = continued(model, tokens, first)
    put(store, first, output)

    turn = torch.cat([output, prompt(batch, 5, seed=2)], 1)
    second = store.load(turn, cache=kind(config=model.config))
    assert isinstance(second, kind)
    assert second.get_seq_length() == 24  # of 29 tokens whose rows the first turn had
    assert torch.equal(continued(model, turn, second), continued(model, turn))


def test_rows_are_the_stored_ones_bit_for_bit(model: Any, store: PrefixStore) -> None:
    tokens = prompt()
    cache = computed(model, tokens)
    put(store, cache, tokens)
    loaded = store.load(tokens)
    assert loaded.get_seq_length() == 16
    for own, other in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(own.keys[:, :, :16], other.keys)
        assert torch.equal(own.values[:, :, :16], other.values)


def test_the_last_token_is_computed(model: Any, store: PrefixStore) -> None:
    """A prompt of whole blocks leaves its last block to the model."""
    tokens = prompt(tokens=24)
    put(store, computed(model, tokens), tokens)
    assert store.load(tokens).get_seq_length() == 16


def test_a_batch_gets_the_prefix_that_all_of_it_have(model: Any, store: PrefixStore) -> None:
    tokens = prompt(2, 30)
    put(store, computed(model, tokens[:1]), tokens[:1])
    put(store, computed(model, tokens[1:, :17]), tokens[1:, :17])
    assert store.load(tokens).get_seq_length() == 16
    assert torch.equal(continued(model, tokens, store.load(tokens)), continued(model, tokens))


def test_the_cache_may_change_when_save_returns(model: Any, store: PrefixStore) -> None:
    tokens = prompt()
    cache = computed(model, tokens)
    right = [layer.keys.clone() for layer in cache.layers]
    transfers = store.save(cache, tokens)
    for layer in cache.layers:
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)
    for transfer in transfers:
        transfer.synchronize(timeout=LIMIT)
    loaded = store.load(tokens)
    assert all(
        torch.equal(layer.keys, keys[:, :, :16])
        for layer, keys in zip(loaded.layers, right, strict=True)
    )


def test_layers_that_are_away_are_saved_from_host_memory(model: Any, store: PrefixStore) -> None:
    """None returns to the device for it, and what was changed before is what is saved."""
    tokens = prompt()
    cache: Any = computed(model, tokens, OffloadedCache(config=model.config))
    for layer in cache.layers:
        layer.keys.mul_(2)
    computed(model, prompt(tokens=3, seed=2), cache)
    right = copy.deepcopy(cache)
    away = [layer.is_away for layer in cache.layers]
    assert away == [True, True, False]
    put(store, cache, tokens)
    assert [layer.is_away for layer in cache.layers] == away
    for layer, loaded in zip(right.layers, store.load(tokens).layers, strict=True):
        assert torch.equal(loaded.keys, layer.keys[:, :, :16])


def test_more_than_the_staging_is_saved(model: Any, folder: str) -> None:
    """A save waits for staging of 16 blocks in place of dropping the others."""
    tokens = prompt(tokens=500)
    room = {**ROOM, "host": 0, "staging": 1 << 18}
    with PrefixStore(model, {"folder": folder, "capacity": 8 << 20, **room}) as store:
        put(store, computed(model, tokens), tokens)
        assert store.load(tokens).get_seq_length() == 496


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"kind": "Qwen2"},
        {"dtype": torch.bfloat16},
    ],
    ids=["weights", "rotary positions", "kind", "dtype"],
)
def test_another_model_has_no_prefix_of_this_one(
    model: Any, folder: str, other: dict[str, Any]
) -> None:
    terms = {"folder": folder, "capacity": 4 << 20, **ROOM}
    tokens = prompt()
    with PrefixStore(model, terms, name="the same") as store:
        put(store, computed(model, tokens), tokens)
        assert store.load(tokens).get_seq_length() == 16
    dtype = other.pop("dtype", torch.float32)
    second = small(**other).to(dtype)
    with PrefixStore(second, terms, name="the same") as store:
        assert store.load(tokens).get_seq_length() == 0


def test_a_model_that_was_trained_further(model: Any, folder: str) -> None:
    """Its configuration is the same, and one of its tensors differs."""
    terms = {"folder": folder, "capacity": 4 << 20, **ROOM}
    tokens = prompt()
    with PrefixStore(model, terms) as store:
        put(store, computed(model, tokens), tokens)
    trained = small()
    with torch.no_grad():
        trained.model.layers[2].self_attn.v_proj.weight.mul_(1.01)
    with PrefixStore(trained, terms) as store:
        assert store.load(tokens).get_seq_length() == 0
    with PrefixStore(small(), terms) as store:  # control: the same weights
        assert store.load(tokens).get_seq_length() == 16


def test_a_salt_keeps_prompts_apart(model: Any, store: PrefixStore) -> None:
    tokens = prompt()
    put(store, computed(model, tokens), tokens, salt=b"an image")
    assert store.load(tokens).get_seq_length() == 0
    assert store.load(tokens, salt=b"another").get_seq_length() == 0
    assert store.load(tokens, salt=b"an image").get_seq_length() == 16


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_whatever_torch_was_told_before(model: Any, store: PrefixStore, state: State) -> None:
    tokens = prompt()
    cache = computed(model, tokens)
    with state(torch.device("cpu")):
        put(store, cache, tokens)
        loaded = store.load(tokens)
    assert torch.equal(loaded.layers[2].values.cpu(), cache.layers[2].values[:, :, :16])


# --- Stores that fail -----------------------------------------------------------------------------


def test_a_bucket_that_hangs(model: Any) -> None:
    """Loads and saves end by the terms' deadline, and the model computes."""
    bucket = HeldBucket()
    room = {**ROOM, "host": 0}
    tokens = prompt()
    with PrefixStore(model, TermsWith.a_bucket(bucket, **room)) as store:
        put(store, computed(model, tokens), tokens)
        assert store.load(tokens).get_seq_length() == 16
    with PrefixStore(model, TermsWith.a_bucket(bucket, deadline=0.5, **room)) as store:
        bucket.hold()
        try:
            assert store.load(tokens).get_seq_length() == 0
            store.save(computed(model, prompt(tokens=200)), prompt(tokens=200))
        finally:
            bucket.release()
        assert torch.equal(continued(model, tokens, store.load(tokens)), continued(model, tokens))


# --- What is refused ------------------------------------------------------------------------------


def test_models_that_are_refused(folder: str) -> None:
    terms = {"folder": folder, **ROOM}
    with refused(IntegrationError, "model='llama'"):
        PrefixStore("llama", terms)
    encoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2
        )
    )
    with refused(IntegrationError, "T5ForConditionalGeneration", "encoder"):
        PrefixStore(encoder, terms)
    factors = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with refused(IntegrationError, "'dynamic'", "length"):
        PrefixStore(small(rope_parameters=factors), terms)
    assert not list(Path(folder).iterdir())


def test_terms_that_are_refused(model: Any, folder: str) -> None:
    with refused(InvalidTerms, "shared"):
        PrefixStore(model, StoreTerms(folder=folder, shared=True))
    with refused(InvalidTerms, "by_layer"):
        PrefixStore(model, {"folder": folder, "by_layer": True})
    with refused(InvalidTerms, "'floder'"):
        PrefixStore(model, {"floder": folder})
    with refused(InvalidTerms, "terms"):
        PrefixStore(model, folder)  # type: ignore[arg-type]


def test_prompts_that_are_refused(model: Any, store: PrefixStore) -> None:
    tokens = prompt(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with refused(InvalidTerms, "attention_mask", "padding"):
        store.load(tokens, mask)
    with refused(InvalidTerms, "attention_mask"):
        store.load(tokens, torch.ones(2, 3))
    wrong: Any
    for wrong in (tokens[0], tokens.float(), tokens.tolist(), torch.zeros(1, 0).long()):
        with refused(InvalidTerms, "input_ids"):
            store.load(wrong)
    with refused(InvalidTerms, "salt"):
        store.load(tokens, salt="a text")  # type: ignore[arg-type]
    cache = computed(model, tokens)
    with refused(InvalidTerms, "input_ids", "2 prompts"):
        store.save(cache, tokens[:1])
    with refused(LayoutError, "21 tokens"):
        store.load(tokens, cache=cache)
    windows = small("Mistral", sliding_window=8).config
    with refused(LayoutError, "DynamicSlidingWindowLayer", "DynamicCache(config=model.config)"):
        store.load(tokens, cache=DynamicCache(config=windows))
    fewer = small(num_hidden_layers=2)
    with refused(LayoutError, "3 layers", "2"):
        store.load(tokens, cache=DynamicCache(config=fewer.config))


# --- Several processes ----------------------------------------------------------------------------

TURNS = """
import importlib, json, os, random, signal, sys
from pathlib import Path

import torch
import transformers

CONFIG = {config}
FOLDER = {folder!r}
SIZE = {size}

def child(work):
    \"\"\"Return what work() returned in a fork, and how the fork ended.\"\"\"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0) if sys.exc_info()[0] is None else os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return json.loads(text or "null"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def turn(then=None, guard=True):
    from portakv.integrations.transformers import cache_argument
    from portakv.integrations.transformers_store import PrefixStore

    if not guard:
        disk = importlib.import_module("portakv.storage.tiers.disk")
        disk.verifies = lambda _: False
        disk.verify = lambda *_: True
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    tokens = torch.randint(1, 64, (1, 61), generator=torch.Generator().manual_seed(1))
    terms = dict(folder=FOLDER, capacity=4 << 20, host=0, staging=2 << 20, block_size=SIZE)
    store = PrefixStore(model, terms)
    cache = store.load(tokens)
    loaded = cache.get_seq_length()
    named = {{cache_argument(model): cache}}
    output = model.generate(tokens, max_new_tokens=12, do_sample=False, **named)
    for transfer in store.save(cache, output):
        transfer.synchronize(timeout=60)
    if then == "die":
        os.write(writing, json.dumps(output[0].tolist()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    store.close()
    return loaded, output[0].tolist()

def damage():
    for path in sorted(Path(FOLDER).rglob("slots")):
        image = 4096 * (1 + -(-3 * 2 * 2 * 16 * 4 * SIZE // 4096))
        with path.open("r+b") as file:
            for at in range(4096 + 3, path.stat().st_size, image):
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 0x40]))  # the exponent of the block's first number

reading, writing = os.pipe()
_, died = child(lambda: turn("die"))
own = json.loads(os.read(reading, 1 << 16))
after_kill, _ = child(turn)
damage()
damaged, _ = child(turn)
again, _ = child(turn)
damage()
unguarded, _ = child(lambda: turn(guard=False))
print(json.dumps([died, own, after_kill, damaged, again, unguarded]))
"""


@pytest.mark.full
def test_a_prefix_survives_kill_9_and_a_damaged_one_is_computed(folder: str) -> None:
    """Each turn in a fork of a process that has only imported; the last one checks no block."""
    code = TURNS.format(config=CONFIG, folder=folder, size=SIZE)
    died, own, after_kill, damaged, again, unguarded = json.loads(answer(code))
    assert died == -9
    assert after_kill == [56, own], "61 tokens, of which the last one is computed"
    assert damaged == [0, own], "its first block is damaged"
    assert again == [56, own], "the blocks were saved again"
    assert unguarded[0] == 56
    assert unguarded[1] != own, "control: damaged blocks change the answer"
