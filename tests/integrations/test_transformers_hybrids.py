# SPDX-License-Identifier: Apache-2.0
"""Prefixes of hybrid models of the real transformers: windows, chunks, and states.

A stored prefix goes on as the cache itself would: the same tokens, to the bit.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.waits import LIMIT
from transformers import DynamicCache

from portakv import LayoutError
from portakv.integrations import IntegrationError
from portakv.integrations.transformers.caches import OffloadedCache, cache_argument
from portakv.integrations.transformers.store import PrefixStore
from portakv.integrations.transformers.tails import Tails

SIZE = 8
ROOM: dict[str, Any] = {"host": 4 << 20, "staging": 8 << 20, "block_size": SIZE}
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # wide enough that the answer depends on the whole prompt
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
WINDOW = {"sliding_window": 12}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
GDN = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": LINEAR,
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
#: The names of the configuration and the model, and what the configuration has.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "windows alone": ("MistralConfig", "MistralForCausalLM", WINDOW),
    "windows, Phi 3": ("Phi3Config", "Phi3ForCausalLM", WINDOW),
    "windows, Gemma 2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**WINDOW, "query_pre_attn_scalar": 16},
    ),
    "windows, Gemma 3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**MIXED, "query_pre_attn_scalar": 16},
    ),
    "windows and sinks, GPT-OSS": ("GptOssConfig", "GptOssForCausalLM", {**MIXED, **EXPERTS}),
    "windows, Cohere 2": ("Cohere2Config", "Cohere2ForCausalLM", MIXED),
    "windows, OLMo 3": ("Olmo3Config", "Olmo3ForCausalLM", MIXED),
    "windows, Qwen 2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "chunks, Llama 4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **EXPERTS,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 9,
            "intermediate_size_mlp": 96,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        },
    ),
    "delta networks, Qwen3-Next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **GDN,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0, 1, 2, 3],
        },
    ),
    "delta networks, Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", GDN),
    "Mamba 2, Granite 4": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **MAMBA_2,
            **EXPERTS,
            "layer_types": ["mamba", "attention"] * 2,
            "shared_intermediate_size": 64,
        },
    ),
    "Mamba 2 in each layer, Falcon H1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {**MAMBA_2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_expand": 1},
    ),
    "Mamba 2 and layers without a cache, Nemotron H": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "hybrid_override_pattern": "M*M-",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 16,
            "expand": 1,
        },
    ),
    "Mamba 1, Jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "use_mamba_kernels": False,
        },
    ),
    "short convolutions, LFM 2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "block_dim": 64},
    ),
    "states and windows, RecurrentGemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"lru_width": 64, "attention_window_size": 12, "block_types": ["recurrent", "attention"]},
    ),
}


#: Models that drop their states in earlier releases if they go on with several tokens at once.
SINCE = {"Mamba 1, Jamba": (5, 23), "states and windows, RecurrentGemma": (5, 23)}
RELEASE = tuple(int(each) for each in transformers.__version__.split(".")[:2])


def small(name: str) -> Any:
    """A model of four layers on the host."""
    config, model, more = FAMILIES[name]
    if not hasattr(transformers, config):
        pytest.skip(f"this release of transformers has no {config}")
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**CONFIG | more)).eval()
    if SINCE.get(name, (0,)) > RELEASE:
        refused = (IntegrationError, LayoutError)
        with pytest.raises(refused, match=r"its cache|outside of the cache"):
            PrefixStore(made, ROOM)
        pytest.skip("refused: this release drops the states")
    return made


def prompt(tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """The prompts and nine greedy tokens after them."""
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    options[cache_argument(model)] = cache
    output: torch.Tensor = model.generate(tokens, **options)
    return output


def put(store: PrefixStore, cache: Any, tokens: torch.Tensor) -> None:
    for transfer in store.save(cache, tokens):
        transfer.synchronize(timeout=LIMIT)


@pytest.mark.parametrize(
    "length",
    [pytest.param(5, marks=pytest.mark.full), pytest.param(16, marks=pytest.mark.full), 37],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_next_turn_goes_on_as_the_cache_would(name: str, length: int) -> None:
    """Shorter than a window, whole blocks, and longer; the answer depends on the first tokens."""
    model = small(name)
    with PrefixStore(model, ROOM) as store:
        first = store.load(prompt(length, 1))
        assert first.get_seq_length() == 0
        output = continued(model, prompt(length, 1), first)
        put(store, first, output)
        turn = torch.cat([output, prompt(7, 2)], 1)
        loaded = store.load(turn)
        assert loaded.get_seq_length() == output.shape[1] - 1
        expected = continued(model, turn, copy.deepcopy(first))
        assert torch.equal(continued(model, turn, loaded), expected)
        other = torch.cat([prompt(length, 1), prompt(3, 9), turn], 1)
        assert store.load(other).get_seq_length() == 0  # another position


@pytest.mark.parametrize("kind", [DynamicCache, OffloadedCache])
@pytest.mark.parametrize("name", ["windows, Gemma 3", "delta networks, Qwen3.5"])
def test_batches_and_caches_that_leave_the_device(
    name: str, kind: type[Any], tmp_path: Path
) -> None:
    """On a disk, by a store that is opened again; a batch gets what all of its prompts have."""
    model = small(name)
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    terms = {**ROOM, "folder": str(folder), "capacity": 8 << 20}
    tokens = prompt(21, 1, batch=2)
    with PrefixStore(model, terms) as store:
        first = store.load(tokens, cache=kind(config=model.config))
        output = continued(model, tokens, first)
        put(store, first, output)
    turn = torch.cat([output, prompt(5, 2, batch=2)], 1)
    with PrefixStore(model, terms) as store:
        second = store.load(turn, cache=kind(config=model.config))
        assert isinstance(second, kind)
        assert second.get_seq_length() == 29
        expected = continued(model, turn, copy.deepcopy(first))
        assert torch.equal(continued(model, turn, second), expected)
        lacks = torch.cat([turn[:1], prompt(35, 5)])
        assert store.load(lacks).get_seq_length() == 0


class WrongTails(Tails):
    """Tails that hold zeros for one half, or what the first one had."""

    def __init__(self, right: Tails, fault: str) -> None:
        super().__init__(right.layers, right.size)
        self.fault = fault
        self.first: torch.Tensor | None = None

    def of(self, cache: Any, tokens: int) -> torch.Tensor:
        made = super().of(cache, tokens)
        if self.first is None:
            self.first = made.clone()
        half = self.nbytes // 2
        if self.fault == "first half left out":
            made[:, :half] = 0
        elif self.fault == "second half left out":
            made[:, half:] = 0
        else:
            made = self.first
        return made


@pytest.mark.parametrize(
    "fault", ["first half left out", "second half left out", "of another position"]
)
@pytest.mark.parametrize("name", ["windows alone", "delta networks, Qwen3.5", "Mamba 1, Jamba"])
def test_what_is_left_out_is_noticed(name: str, fault: str) -> None:
    """The controls: another answer."""
    model = small(name)
    with PrefixStore(model, ROOM) as store:
        assert store._tails is not None
        store._tails = WrongTails(store._tails, fault)
        for length in (21, 30):
            first = store.load(prompt(length, 1))
            output = continued(model, prompt(length, 1), first)
            put(store, first, output)
        turn = torch.cat([output, prompt(1, 2)], 1)
        loaded = store.load(turn)
        assert loaded.get_seq_length() == 38
        expected = continued(model, turn, copy.deepcopy(first))
        assert not torch.equal(continued(model, turn, loaded), expected)


def test_a_model_that_drops_its_states_is_refused() -> None:
    """As Bamba of transformers 5.23 does, if it goes on with several tokens at once."""
    model = small("delta networks, Qwen3.5")
    forward = model.forward

    def forgetful(*args: Any, **terms: Any) -> Any:
        name = cache_argument(model)
        cache = terms.get(name)
        if cache is not None and cache.get_seq_length():
            for layer in cache.layers[:3]:
                layer.recurrent_states[0].zero_()
        return forward(*args, **terms)

    named: Any = forgetful
    named.__signature__ = inspect.signature(forward)
    model.forward = forgetful
    with pytest.raises(IntegrationError, match="goes on from its cache"):
        PrefixStore(model, ROOM)


def test_models_of_states_alone_are_refused() -> None:
    config = transformers.MambaConfig(**CONFIG | {"state_size": 8})
    with pytest.raises(IntegrationError, match="which counts its tokens, got a MambaForCausalLM"):
        PrefixStore(transformers.MambaForCausalLM(config).eval(), ROOM)


def test_a_cache_of_another_kind_is_refused() -> None:
    model = small("windows, Gemma 3")
    with PrefixStore(model, ROOM) as store:
        with pytest.raises(LayoutError, match="a cache of the model's 4 layers"):
            store.load(prompt(20, 1), cache=DynamicCache())
        other = DynamicCache(config=small("windows alone").config)
        with pytest.raises(LayoutError, match="or of other kinds"):
            store.load(prompt(20, 1), cache=other)


def test_a_prefix_of_fewer_tokens_than_the_cache_has_is_not_stored_whole() -> None:
    """Its windows and states are those of a later position."""
    model = small("delta networks, Qwen3.5")
    with PrefixStore(model, ROOM) as store:
        cache = DynamicCache(config=model.config)
        tokens = prompt(20, 1)
        with torch.no_grad():
            model(tokens, **{cache_argument(model): cache})
        put(store, cache, tokens[:, :17])
        assert store.load(torch.cat([tokens[:, :17], prompt(5, 2)], 1)).get_seq_length() == 0
        put(store, cache, tokens)
        assert store.load(torch.cat([tokens, prompt(5, 2)], 1)).get_seq_length() == 20


def test_windows_of_a_later_position_are_not_stored() -> None:
    """A model of windows alone, whose cache has more tokens than the prompt."""
    model = small("windows alone")
    with PrefixStore(model, ROOM) as store:
        cache = store.load(prompt(20, 1))
        continued(model, prompt(20, 1), cache)
        assert store.save(cache, prompt(20, 1)) == []


def test_a_model_without_a_head() -> None:
    model = small("windows, Gemma 3").model
    with PrefixStore(model, ROOM) as store:
        assert store.load(prompt(20, 1)).get_seq_length() == 0


def test_keys_of_tails_differ_by_what_is_before_and_by_the_salt() -> None:
    with PrefixStore(small("windows alone"), ROOM) as store:
        prefixes = store._prefixes
        (key,) = prefixes.keys(range(SIZE))
        assert prefixes.tail_key([key], [1, 2], b"s") != prefixes.tail_key([], [1, 2], key + b"s")
