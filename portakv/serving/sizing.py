# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk the blocks of a model take, from its configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from portakv.errors import InvalidTerms

#: The configuration of a model, as ``config.json`` has it.
Config: TypeAlias = "Mapping[str, Any]"
#: Tokens of a step of a serving engine, whose rows are saved together.
STEP = 8192
#: Tokens of which vLLM's blocks are multiples.
UNIT = 16
#: Steps whose rows are in staging at the same time: of saves, and of loads.
STEPS = 2

#: The kinds of layers: rows of all tokens, rows of the last tokens, a state, and no cache.
FULL = "rows of all tokens"
WINDOW = "a window of tokens"
CHUNK = "a chunk of tokens"
STATE = "a state instead of rows of tokens"
NONE = "no cache"
#: The kinds of layers that keep rows.
ROWS = (FULL, WINDOW, CHUNK)
#: The kind of a layer by its name in a list such as ``layer_types``.
KINDS = {
    "full_attention": FULL,
    "attention": FULL,
    "indexed_attention": FULL,
    "chunked_attention": CHUNK,
    "deepseek_sparse_attention": FULL,
    "sliding_attention": WINDOW,
    "linear_attention": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "conv": STATE,
    "recurrent": STATE,
    "mlp": NONE,
    "moe": NONE,
}
#: Keys that list the layers, with the kind of a layer by its entry.
LISTS: Mapping[str, Mapping[Any, str]] = {
    "layers_block_type": KINDS,
    "layer_types": KINDS,
    "attn_type_list": {1: FULL, 0: STATE},
    "hybrid_layer_pattern": {0: FULL, 1: WINDOW},
}
#: The kind of a layer by its letter in ``hybrid_override_pattern``.
LETTERS = {"*": FULL, "M": STATE, "-": NONE, "E": NONE}
#: Keys that have the configuration of the text model, if a model also reads images or sounds.
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
#: Names of one number, as families of models have them.
LAYERS = ("num_hidden_layers", "n_layer")
HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_DIM = ("head_dim", "attention_head_dim")
WIDTH = ("hidden_size", "n_embd")
#: The tokens of a scale in an index of keys: each 128 numbers of a byte have a scale of 4 bytes.
SCALED = 128
SCALE = 4
#: The dimension of a head's values, if it is not that of its keys.
VALUE_DIM = "v_head_dim"
#: Models with ``kv_lora_rank`` whose cache has latent rows in vLLM 0.32
#: (``is_deepseek_mla``); others expand the rows to keys and values by head.
LATENT = (
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k2",
    "kimi_linear",
    "longcat_flash",
    "pangu_ultra_moe",
)

#: Models whose layers all have the same caches, which may be several.
EACH: Mapping[str, tuple[str, ...]] = {
    "falcon_h1": (FULL, STATE),
    "falcon_mamba": (STATE,),
    "longcat_flash": (FULL, FULL),
    "mamba": (STATE,),
    "mamba2": (STATE,),
}
#: Values of keys that a ``config.json`` may leave out, by the type of the model.
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "cohere2": {"sliding_window_pattern": 4},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window_pattern": 6,
    },
    "llama4": {"no_rope_layer_interval": 4},
    "llama4_text": {"no_rope_layer_interval": 4},
}
#: Models whose layers read tokens in both directions, and keep no rows.
ENCODERS = ("bert", "deberta-v2", "modernbert", "nomic_bert", "roberta", "xlm-roberta")
#: Models whose recurrent states vLLM keeps with 32 bits, unless ``mamba_ssm_cache_dtype`` says
#: otherwise.
IN_32_BITS = ("nemotron_h", "nemotron_h_omni", "nemotron_h_puzzle")

#: Keys that `sizes_of` reads.
READ = {
    *LAYERS,
    *HEADS,
    *KV_HEADS,
    *HEAD_DIM,
    *WIDTH,
    VALUE_DIM,
    "kv_lora_rank",
    "qk_rope_head_dim",
    "block_configs",
    "hybrid_override_pattern",
    "layers_block_type",
    "layer_types",
    "full_attention_interval",
    "linear_attn_config",
    "attn_layer_period",
    "attn_layer_offset",
    "attn_layer_indices",
    "attn_type_list",
    "layer_group_size",
    "full_attn_idxs",
    "hybrid_layer_pattern",
    "sliding_window",
    "sliding_window_size",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
    "use_sliding_window",
    "max_window_layers",
    "attention_chunk_size",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
    "global_head_dim",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "index_topk",
    "index_head_dim",
    "index_topk_freq",
    "index_topk_pattern",
    "index_skip_topk_offset",
    "indexer_types",
    "sparse_attention_config",
    "compress_ratios",
    "compress_rates",
    "multi_query",
    "new_decoder_architecture",
    "cla_share_factor",
}
#: A key with one of these words may decide what a row is.
SHAPING = re.compile(
    r"kv|heads?(_|$)|attn|attention|window|swa|sliding|layer_type|layers_type|block_type|block_config"
    r"|pattern|mamba|ssm|conv|linear|recurrent|compress|index_|indexer|lora_rank|sparse|cla_|"
    r"per_layer_config|state|key_value|latent"
)
#: Keys of that kind that do not: numbers of heads of queries, of the index and of states, terms of
#: other layers, and of training and generation.
HARMLESS = re.compile(
    r"_?(bias|dropout|theta|norm|norm_type|scale|multipliers?|softcapping|prob|act|scalar|factor|"
    r"interleave|gate|token_index|kernels|init|coef|loss|pdrop|tuning)$"
    r"|^(q_lora_rank|o_lora_rank|qk_head_dim|qk_nope_head_dim|index_n_heads|index_local_blocks)$"
    r"|^(swa_num_attention_heads|attention_hidden_size|attention_output_gate|attn_output_gate)$"
    r"|^(mamba|ssm|conv|linear|short_conv|use_mamba|use_conv|state)_|^(mamba_|)d_state$"
    r"|^mtp_|^(cross_attention_hidden_size|add_cross_attention|output_attentions)$"
    r"|^(output_hidden_states|pruned_heads|num_reward_heads|decoder_sparse_step|attn_res_block_size)$"
    r"|^(expert|moe|shared|activation|vision|audio|image|video)_|^index_share_for_mtp_iteration$|attention_bias$|^parallel_attn$"
    r"|^(mlp_layer_types|no_rope_layers|latent_moe_use_norm|use_bidirectional_attention)$"
    r"|^(use_cache|norm_topk_prob|attn_temperature_tuning|mamba_ssm_dtype|is_causal|_attn\w*)$"
    r"|^(rescale_prenorm_residual|attn_implementation|ignore_index|img_token_compression_config)$"
    r"|^hidden_mamba_act$|^attn_implementation|^use_qkv|^use_(qk|gemma)_norm|^qkv_|^clip_qkv$"
    r"|^scale_attn_\w+$|softmax_in_fp32$|^(attention_scale|add_(swa|full)_attention_sink_bias|attention_value_scale|lm_head\w*)$"
)
#: The most names of keys in a sentence.
NAMED = 4


class Sizes(NamedTuple):
    """The bytes that a model's rows take.

    Attributes:
        token: of one token in all layers; 0: not known, see ``unknown``.
        staging: that saves and loads do not wait for, with steps of `STEP` tokens.
        windows: some layers keep a window of the tokens, or no rows of tokens.
        refused: why vLLM's connector does not serve the model; empty: it does.
        unknown: why the bytes of a token are not known; empty: they are.
        layer: bytes of one token in the layer with the widest rows.
        window: tokens of the windows; None: no layer has one.
        layers: how many layers there are of each kind.
        state: bytes of the states of all layers after a token; 0: none has one, or not known.
        state_layer: of the layer with the largest one.
        indexed: how many layers keep an index next to their rows, in a cache of its own.
        has_known_index: rows of the index can be read by token: it is that of DeepSeek V3.2.
    """

    token: int
    staging: int
    windows: bool = False
    refused: str = ""
    unknown: str = ""
    layer: int = 0
    window: int | None = None
    layers: Mapping[str, int] = MappingProxyType({})
    state: int = 0
    state_layer: int = 0
    indexed: int = 0
    has_known_index: bool = False

    @property
    def has_states(self) -> bool:
        """Return whether some layers keep a state."""
        return STATE in self.layers

    @property
    def block(self) -> int:
        """Return the tokens of a block that takes as much as the state of a layer: vLLM's blocks
        have as many or more; 0 without states, or if that is not known."""
        tokens = -(-self.state_layer // self.layer) if self.layer else 0
        return -(-tokens // UNIT) * UNIT

    def tokens(self, nbytes: int) -> int:
        """Return how many tokens fit into some bytes."""
        return nbytes // self.token


class _Unknown(Exception):
    """A configuration whose rows are not known, for the reason in the text."""


def sizes_of(config: Config) -> Sizes:
    """Return the sizes of a model.

    Args:
        config: of ``config.json``, as Hugging Face has it.

    A key that may decide what a row is, and is not known, gives no size. Speculative layers, which
    an engine has on request, are not counted.

    Raises `InvalidTerms` for a configuration without layers or with a value that is not a number.
    """
    config = _with_defaults(_text_model(config))
    item = _item_bytes(config)
    refused = _refusal_of_keys(config)
    if refused:
        unknown = "its layers keep no rows of a fixed size for each token"
        return Sizes(0, 0, refused=refused, unknown=unknown)
    try:
        _check_keys(config)
        kinds = _kinds(config)
        rows = _rows(config, kinds)
        indices = _indices(config, kinds)
        window = _optional(config, "sliding_window") if WINDOW in kinds else None
        refused = _refusal(config, kinds, rows)
        layer = max(rows)
        states = _states(config, kinds)
    except _Unknown as error:
        return Sizes(0, 0, unknown=str(error))
    except InvalidTerms:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        unknown = f"its configuration has values of other kinds than a model's ({error})"
        return Sizes(0, 0, unknown=unknown)
    has_windows = any(kind != FULL for kind in kinds if kind != NONE)
    counts = Counter(kind for kind in kinds if kind != NONE)
    indexed = sum(map(bool, indices))
    known_index = bool(indexed and config.get("index_topk"))
    if item is None or (indices and item == 1):
        unknown = "its dtype, or the attention backend, decides how the cache keeps a row"
        return Sizes(
            0,
            0,
            has_windows,
            refused,
            unknown,
            layers=counts,
            indexed=indexed,
            has_known_index=known_index,
        )
    token = item * sum(rows) + sum(indices)
    return Sizes(
        token,
        STEPS * STEP * token,
        has_windows,
        refused,
        "",
        item * layer,
        window,
        counts,
        sum(states),
        max(states, default=0),
        indexed,
        known_index,
    )


def _text_model(config: Config) -> Config:
    """Return the configuration of the text model in that of a model."""
    for name in NESTED:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return _text_model({**config, name: None, **inner})
    return config


def _with_defaults(config: Config) -> Config:
    """Return a configuration with the values that its type of model has where it has none."""
    defaults = DEFAULTS.get(str(config.get("model_type")), {})
    missing = {name: value for name, value in defaults.items() if config.get(name) is None}
    return {**config, **missing}


def _item_bytes(config: Config) -> int | None:
    """Return the bytes of a number in the cache as vLLM chooses it; None if it is not known.

    A quantized model may bring scales for a cache of 8 bits. vLLM serves models of float32 with
    numbers of 16 bits.
    """
    quantized = config.get("quantization_config")
    if isinstance(quantized, Mapping):
        inner = quantized.get("quantization")
        places = [quantized, inner] if isinstance(inner, Mapping) else [quantized]
        by_scales = str(quantized.get("quant_method", "")).startswith(("modelopt", "compressed"))
        for place in places if by_scales else ():
            scheme = place.get("kv_cache_scheme") or place.get("kv_cache_quant_algo")
            if scheme:
                return 1 if _has_8_bits(scheme) else None
    name = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    return {"float32": 2, "bfloat16": 2, "float16": 2}.get(name.removeprefix("torch."))


def _has_8_bits(scheme: object) -> bool:
    """Return whether a scheme of a quantized cache has numbers of 8 bits."""
    if isinstance(scheme, Mapping):
        return scheme.get("num_bits") == 8
    return str(scheme).lower() == "fp8"


def _check_keys(config: Config) -> None:
    """Raise `_Unknown` for keys that may decide what a row is and are not read."""
    model = config.get("model_type")
    if EACH.get(str(model)) == (STATE,):  # the type says what each layer has
        return
    unknown = [
        name
        for name, value in config.items()
        if value not in (None, False, 0, [], {})
        and name not in READ
        and SHAPING.search(name)
        and not HARMLESS.search(name)
        and not name.endswith("_config")
    ]
    others = ("attn_config", "per_layer_config", "use_cla")
    unknown += [name for name in others if config.get(name)]
    if unknown:
        names = ", ".join(unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise _Unknown(f"its configuration has keys that may change its rows: {names}{more}")
    if config.get("kv_lora_rank") and model not in (None, *LATENT):
        raise _Unknown(f"engines may keep the rows of the type {model!r} latent or expanded")


def _refusal_of_keys(config: Config) -> str:
    """Return why vLLM's connector does not serve a model whose layers are not read; else ''."""
    if config.get("is_encoder_decoder") is True or config.get("cross_attention_layers"):
        return "its layers of cross attention keep rows of the encoder's tokens"
    both = config.get("is_causal") is False or config.get("use_bidirectional_attention") is True
    if both or config.get("model_type") in ENCODERS:
        return "its layers read tokens in both directions, and keep no rows"
    if config.get("compress_ratios") or config.get("compress_rates"):
        return "its layers keep compressed rows of several tokens, and windows of others"
    if config.get("param_sink_number"):
        return "its rows of sinks lie in blocks of the cache that no request has"
    listed = config.get("layer_types")
    if isinstance(listed, list) and "reference_sliding_attention" in listed:
        return "its windows of generated tokens begin at the end of a prompt"
    return ""


def _refusal(config: Config, kinds: Sequence[str], rows: Sequence[int]) -> str:
    """Return why vLLM's connector does not serve the layers of a model; empty if it does."""
    if not any(rows) and STATE not in kinds:
        return "none of its layers keeps rows of tokens"
    for kind in ROWS:
        wide = {wide for wide, each in zip(rows, kinds, strict=True) if each == kind and wide}
        if len(wide) > 1:
            return f"its layers that keep {kind} have rows of several sizes"
    return ""


def _kinds(config: Config) -> list[str]:
    """Return the kind of each cache of each layer that has one of its own.

    Raises `_Unknown` for kinds that are not known.
    """
    each = EACH.get(str(config.get("model_type")))
    if each is not None:
        return [*each] * _number(config, *LAYERS, "num_layers")
    kinds = _all_kinds(config)
    count = _optional(config, *LAYERS)
    if count is not None and count != len(kinds):
        raise _Unknown(f"it has {count} layers, and its configuration lists {len(kinds)}")
    shared = _optional(config, "num_kv_shared_layers") or 0
    if shared >= len(kinds) > 0:
        raise _Unknown(f"{shared} of its {len(kinds)} layers share a cache")
    # The last layers read the caches of earlier ones.
    return kinds[: len(kinds) - shared]


def _all_kinds(config: Config) -> list[str]:
    """Return the kind of each layer, from the first key that says it."""
    blocks = config.get("block_configs")
    if blocks:
        return [NONE if _kv_heads_of(block, 1) == 0 else FULL for block in _items(blocks)]
    pattern = config.get("hybrid_override_pattern")
    if pattern:
        return [_kind_of(letter, LETTERS) for letter in _letters(pattern)]
    for name, kinds in LISTS.items():
        if config.get(name):
            return [_kind_of(each, kinds) for each in _items(config[name])]
    count = _optional(config, *LAYERS)
    if count is None:
        raise InvalidTerms(
            f"Expected {' or '.join(LAYERS)}, or a list such as layer_types, in the config.json of "
            f"a model, got neither. Pass the folder of a model that generates text."
        )
    full = _full_layers(config, count)
    if full is None:
        return _by_window(config, count)
    return [FULL if layer in full else STATE for layer in range(count)]


def _full_layers(config: Config, count: int) -> Container[int] | None:
    """Return the layers with rows of all tokens, while the others keep a state; None: no key names
    them."""
    interval = _optional(config, "full_attention_interval")
    if interval:
        return range(interval - 1, count, interval)
    grouped = _optional(config, "layer_group_size")
    if grouped:  # layers behind the last whole group have rows too
        return {*range(grouped - 1, count, grouped), *range(count // grouped * grouped, count)}
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping):
        return {each - 1 for each in _items(linear.get("full_attn_layers"))}  # counted from 1
    period = _optional(config, "attn_layer_period")
    if period:
        return range(_number(config, "attn_layer_offset", default=0), count, period)
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if config.get(name):
            return set(_items(config[name]))
    if any(re.match("(mamba|ssm|linear)_|short_conv", name) for name in config):
        raise _Unknown("some of its layers may keep a state, and no known key says which")
    return None


def _by_window(config: Config, count: int) -> list[str]:
    """Return the kinds of layers of which some or all keep a window or a chunk."""
    every = _optional(config, "no_rope_layer_interval")
    if every and config.get("attention_chunk_size"):
        has_chunk = config.get("no_rope_layers") or [(n + 1) % every for n in range(count)]
        return [CHUNK if each else FULL for each in _items(has_chunk)]
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window", True) is False:
        return [FULL] * count
    names = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
    pattern = next((config[name] for name in names if config.get(name)), None)
    if isinstance(pattern, str) and pattern:
        letters = (pattern * count)[:count]
        return [_kind_of(each, {"L": WINDOW, "G": FULL}) for each in letters]
    if isinstance(pattern, int) and pattern > 1:
        full: Container[int] = range(pattern - 1, count, pattern)
    else:
        first = config.get("max_window_layers") if "use_sliding_window" in config else 0
        if first is not None and type(first) is not int:
            raise _Unknown(f"its max_window_layers is {first!r}, and not a number")
        full = range(first or 0)
    return [FULL if layer in full else WINDOW for layer in range(count)]


def _rows(config: Config, kinds: Sequence[str]) -> list[int]:
    """Return the numbers of a row in each layer: of keys and values, or a latent row."""
    if not any(kind in ROWS for kind in kinds):
        return [0] * len(kinds)
    if config.get("kv_lora_rank"):
        latent = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
        return [latent if kind in ROWS else 0 for kind in kinds]
    heads = _number(config, *HEADS)
    blocks = config.get("block_configs")
    if blocks:
        dim = _number(config, *HEAD_DIM, default=_number(config, *WIDTH) // heads)
        counts = [_kv_heads_of(block, heads) for block in _items(blocks)]
        return [2 * dim * count for count in counts[: len(kinds)]]
    wide = {kind: _wide(config, kind, heads) for kind in ROWS if kind in kinds}
    return [wide.get(kind, 0) for kind in kinds]


def _wide(config: Config, kind: str, heads: int) -> int:
    """Return the numbers of keys and values of a token in a layer of a kind."""
    kv_heads = _number(config, *KV_HEADS, default=heads)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1
    dim = _optional(config, *HEAD_DIM)
    if dim is None:
        dim = _number(config, *WIDTH) // heads
    values = _number(config, VALUE_DIM, default=dim)
    if kind == WINDOW:
        kv_heads = _number(config, "swa_num_key_value_heads", default=kv_heads)
        dim = _number(config, "swa_head_dim", default=dim)
        values = _number(config, "swa_v_head_dim", default=values)
    elif _optional(config, "global_head_dim"):
        dim = values = _number(config, "global_head_dim")
    if kind == FULL and config.get("attention_k_eq_v"):  # engines store both all the same
        kv_heads = _number(config, "num_global_key_value_heads", default=kv_heads)
    return (dim + values) * kv_heads


#: The keys of Mamba 2: heads, their width, numbers of a state, groups, and the convolution's width.
MAMBA = (
    ("mamba_num_heads", "mamba_n_heads", "num_heads"),
    ("mamba_head_dim", "mamba_d_head", "head_dim"),
    ("ssm_state_size", "mamba_d_state", "state_size"),
    ("n_groups", "mamba_n_groups"),
    ("conv_kernel", "mamba_d_conv"),
)


def _states(config: Config, kinds: Sequence[str]) -> list[int]:
    """Return the bytes of the state of each layer that has one, as vLLM's layers keep them
    (``MambaStateShapeCalculator``); [] if that is not known. Numbers have 16 bits, or 32 where the
    configuration or the kind of layers says so."""
    many = kinds.count(STATE)
    if not many:
        return []
    try:
        numbers, recurrent = _state_numbers(config)
    except (_Unknown, InvalidTerms):
        return []
    of_kda = isinstance(config.get("linear_attn_config"), Mapping)
    names = [config.get("mamba_ssm_dtype")]
    if config.get("model_type") in IN_32_BITS:
        names.append(config.get("mamba_ssm_cache_dtype") or "float32")
    by_name = any(str(name).removeprefix("torch.") == "float32" for name in names)
    return [2 * numbers + (4 if of_kda or by_name else 2) * recurrent] * many


def _state_numbers(config: Config) -> tuple[int, int]:
    """Return the numbers of a layer's convolution and of its recurrent state."""
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping):  # KDA
        heads = _number(linear, "num_heads")
        dim = _number(linear, "head_dim")
        return 3 * heads * dim * (_number(linear, "short_conv_kernel_size") - 1), heads * dim * dim
    if config.get("linear_num_value_heads"):  # gated delta networks
        keys = _number(config, "linear_num_key_heads") * _number(config, "linear_key_head_dim")
        heads = _number(config, "linear_num_value_heads")
        dim = _number(config, "linear_value_head_dim")
        width = _number(config, "linear_conv_kernel_dim") - 1
        wide = _number(config, "linear_key_head_dim")
        return width * (2 * keys + heads * dim), heads * dim * wide
    if config.get("conv_L_cache"):  # short convolutions
        return (_number(config, "conv_L_cache") - 1) * _number(config, *WIDTH), 0
    if any(config.get(name) for name in MAMBA[0]):
        heads, dim, state, groups, width = (_number(config, *names) for names in MAMBA)
        return (width - 1) * (heads * dim + 2 * groups * state), heads * dim * state
    expand = _optional(config, "mamba_expand")  # Mamba 1
    inner = expand * _number(config, *WIDTH) if expand else _number(config, "intermediate_size")
    width = _number(config, "mamba_d_conv", "conv_kernel") - 1
    return width * inner, inner * _number(config, "mamba_d_state", "state_size")


def _indices(config: Config, kinds: Sequence[str]) -> list[int]:
    """Return the bytes of a token in each layer's index of keys; [] for a model without one."""
    count = len(kinds)
    if _optional(config, "index_topk"):
        dim = _number(config, "index_head_dim")
        nbytes = dim + dim // SCALED * SCALE
        return [nbytes * has for has in _have_index(config, count)]
    sparse = config.get("sparse_attention_config")
    if isinstance(sparse, Mapping) and sparse.get("use_sparse_attention"):
        nbytes = 2 * _number(sparse, "sparse_index_dim")
        return [nbytes * bool(each) for each in _items(sparse.get("sparse_attention_freq"))]
    return []


def _have_index(config: Config, count: int) -> Iterable[bool]:
    """Return for each layer whether it has an index, and does not use that of an earlier one."""
    types = config.get("indexer_types")
    if types:
        return [_kind_of(each, {"full": True, "shared": False}) for each in _items(types)]
    pattern = config.get("index_topk_pattern")
    if pattern:
        letters = _letters(pattern)
        if len(letters) < count:
            raise _Unknown(f"it has {count} layers, and index_topk_pattern lists {len(letters)}")
        return [letter != "S" for letter in letters[:count]]
    every = _number(config, "index_topk_freq", default=1)
    offset = _number(config, "index_skip_topk_offset", default=2)
    return [max(layer - offset + 1, 0) % max(1, every) == 0 for layer in range(count)]


def _kv_heads_of(block: object, heads: int) -> int:
    """Return the heads of keys and values in a block of ``block_configs``; 0 if it has no cache."""
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise _Unknown("its block_configs have entries without attention")
    if attention.get("no_op") or attention.get("replace_with_linear"):
        return 0
    return max(1, heads // _number(attention, "n_heads_in_group"))


def _kind_of(name: object, kinds: Mapping[Any, Any]) -> Any:
    """Return the kind of a layer by its name."""
    if not isinstance(name, str | int) or name not in kinds:
        raise _Unknown(f"it has layers of the type {name!r}, which is not known")
    return kinds[name]


def _letters(pattern: object) -> str:
    """Return a pattern of letters."""
    if not isinstance(pattern, str):
        raise _Unknown(f"it has a pattern of layers that is not a text: {pattern!r:.80}")
    return pattern


def _items(value: object) -> list[Any]:
    """Return the items of a list."""
    if not isinstance(value, list):
        raise _Unknown(f"its configuration has {value!r:.80} where a list is expected")
    return value


def _optional(config: Config, *names: str) -> int | None:
    """Return a number of a configuration by the first of its names; None if it is absent."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, str | bool) or (isinstance(value, int) and value < 0):
            raise InvalidTerms(
                f"Expected a number for {name} in a model's configuration, got {value!r}. Correct "
                f"its config.json."
            )
        if not isinstance(value, int):  # such as a list with a number for each layer
            raise _Unknown(f"its {name} is {value!r}, and not one whole number")
        return value
    return None


def _number(config: Config, *names: str, default: int | None = None) -> int:
    """Return a number of a configuration by the first of its names."""
    value = _optional(config, *names)
    if value is not None:
        return value
    if default is None:
        raise _Unknown(f"its configuration has no {' or '.join(names)}")
    return default
