# SPDX-License-Identifier: Apache-2.0
"""Write the generated tables of the README and of some pages of docs/.

With ``--check`` fail where they are stale.

The table of first tokens comes from `benchmarks/results/engines-h200.json`.
The table of integrations has the ranges of releases of `portakv.integrations`. The table of layouts
comes from `portakv.layout.presets`, those of backends from
`conformance/support_matrix.toml`, whose rows the files in `conformance/results` prove. A level
whose backend has changed stays in the table as expired. One whose suite got more cases since says
how many. Repeat its run and keep the report with `.ci/keep_result.py` to renew it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from portakv.integrations import MATRIX as RELEASES
from portakv.integrations import TIER_RELEASES
from portakv.layout.presets import PRESETS
from portakv_conformance.evidence import evidence, support_matrix
from portakv_conformance.evidence.verify import newer_cases
from portakv_conformance.faults import report as tier_reports
from portakv_conformance.record import SCHEMA, JsonObject
from portakv_conformance.report import results
from portakv_conformance.run.runner import cases_of

ROOT = Path(__file__).parent.parent
#: Where a link of the README leads on any page that shows it.
FILES = "https://github.com/portakv/portakv/blob/main/"
README = ROOT / "README.md"
MATRIX = ROOT / "conformance" / "support_matrix.toml"
ENGINES = "benchmarks/results/engines-h200.json"

FAMILIES = ("LMCache", "vLLM-Ascend", "vLLM-RBLN", "vLLM", "SGLang", "FlexKV", "Dynamo")


# For docs/hardware.md: devices, what torch calls them, the backend that serves them or a part of
# them, and how the devices of those of its levels begin that are about them.
HARDWARE = (
    ("NVIDIA", "cuda", "cuda", "NVIDIA"),
    ("Ascend A2, A3", "npu", "ascend", ""),
    ("Ascend, AscendC kernel", "npu", "ascendc-emulated", ""),
    ("Cambricon MLU", "mlu", "mlu", ""),
    ("AMD, Hygon DCU", "cuda", "hip", ""),
    ("AMD, Hygon DCU: host side and kernel text", "cuda", "hip-emulated", ""),
    ("AMD, Hygon DCU", "cuda", "triton", "AMD"),
)


def layouts() -> str:
    """One row for each family of engines: its presets."""
    families: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        family = next((f for f in FAMILIES if preset.engine.startswith(f)), preset.engine)
        families.setdefault(family, []).append(preset.name)
    rows = [f"| {f} | {', '.join(f'`{n}`' for n in names)} |" for f, names in families.items()]
    return "\n".join(["| engine | presets |", "|---|---|", *rows])


#: The columns of the table of first tokens: what answers, by connector and part of the run.
FIRST_TOKENS = (
    ("computed again", "off", "recompute"),
    ("vLLM's own offloading", "vllm", "hit"),
    ("PortaKV", "portakv host", "hit"),
)
#: The models of its rows, as the results call them, each with vLLM's setting for it. The first is
#: vLLM's default.
MODELS = {
    "Llama-3-8B, a tensor for each layer": "default: a tensor for each layer",
    "Llama-3-8B, one tensor for all layers": "`VLLM_USE_V2_MODEL_RUNNER=0`: one tensor for all",
}


def first_tokens_by_default() -> str:
    """The rows of vLLM's default, for the README."""
    return first_tokens(list(MODELS)[:1])


def first_tokens(models: Iterable[str] = MODELS) -> str:
    """One row for each known prompt: ms until its first token, by where its rows come from."""
    recorded = json.loads((ROOT / ENGINES).read_text(encoding="utf-8"))["rows"]
    rows = [row for row in recorded if row["kind"] == "engine_prompt" and row["verified"]]
    by = {(row["shape"], row["backend"], row["op"]): row for row in rows}
    lengths = sorted({row["tokens"] for row in rows})
    heads = " | ".join(words for words, *_ in FIRST_TOKENS)
    settings = [MODELS[model] for model in models]
    several = len(settings) > 1  # else a column would say the same in each row
    column = " vLLM's memory of the KV cache |" if several else ""
    lines = [f"| tokens of the prompt |{column} {heads} | PortaKV / vLLM's |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for model, setting in zip(models, settings, strict=True):
        for tokens in lengths:
            shape = f"{tokens} tokens, {model}"
            answers = [by[shape, connector, part] for _, connector, part in FIRST_TOKENS]
            times = [f"{row['p50_ms']:.0f} ms" for row in answers]
            ratio = answers[-1]["of_own"]
            if ratio < 1:
                times[-1] = f"**{times[-1]}**"
            said = f" {setting} |" if several else ""
            lines.append(f"| {tokens:,} |{said} {' | '.join(times)} | {ratio:.2f} |")
    return "\n".join(lines)


def backends() -> str:
    """One row for each backend-device pair, with how far it was verified."""
    text = results.table(borne_out(), newer=newer)
    return text.replace("](conformance/", f"]({FILES}conformance/")


def newer(level: support_matrix.SupportLevel) -> int:
    """How many cases the suite got after the run that proves a level; 0 for jobs of other kinds."""
    file = ROOT / level.evidence
    if json.loads(file.read_text(encoding="utf-8")).get("schema") != SCHEMA:
        return 0
    return len(newer_cases(results.read(file), listed))


@cache
def listed(profile: str, device: str) -> dict[str, JsonObject]:
    """The cases of a profile on a kind of device, which take seconds to collect."""
    return cases_of(profile, device)


def hardware() -> str:
    """One row for each vendor's device and backend: its levels, highest first."""
    matrix = borne_out()
    rows = ["| device | torch calls it | backend | how far it was verified |", "|---|---|---|---|"]
    for device, kind, backend, begins in HARDWARE:
        levels_here = [
            level
            for levels in support_matrix.by_pair(matrix).values()
            for level in levels
            if level.backend == backend and level.device.startswith(begins)
        ]
        levels_here.sort(key=lambda level: level.level, reverse=True)
        reached = (
            "; ".join(results.reached(level, matrix) for level in levels_here) or "R0: described"
        )
        rows.append(f"| {device} | `{kind}` | `{backend}` | {reached} |")
    return "\n".join(rows)


def tiers() -> str:
    """One row for each of PortaKV's tiers: how many faults came to what."""
    folder = "conformance/tiers/"
    return tier_reports.totals_table(ROOT / folder, f"{FILES}{folder}")


#: Rows of the table of integrations: the engine and what is added, its releases, what chooses it,
#: and the page with what it is called.
INTEGRATIONS = (
    ("LMCache", RELEASES["lmcache"], "`LMCACHE_DEVICE_BACKEND=portakv-cuda`", "lmcache.md", "page"),
    (
        "LMCache's MP server, with a disk that outlives it",
        RELEASES["lmcache"],
        '`--l2-adapter` with `"type": "plugin"`',
        "lmcache_l2.md",
        "page",
    ),
    ("SGLang", RELEASES["sglang"], "`PORTAKV_SGLANG=1`", "sglang.md", "page"),
    (
        "SGLang, with a disk or a bucket that outlives it",
        RELEASES["sglang"],
        "`--hicache-storage-backend dynamic`",
        "sglang.md#store-pages-on-a-disk-or-in-a-bucket",
        "page",
    ),
    (
        "vLLM, with a disk that outlives it",
        RELEASES["vllm"],
        "`kv_connector` and its module",
        "vllm_tiers.md",
        "tutorial",
    ),
    (
        "vLLM, prefill and decode in two engines",
        RELEASES["vllm"],
        "`kv_connector`, its module and `kv_role`",
        "vllm_prefill_decode.md",
        "tutorial",
    ),
    (
        "vLLM, another worker for its offloading",
        RELEASES["vllm"],
        "two keys of `kv_connector_extra_config`",
        "vllm.md",
        "page",
    ),
    (
        "vLLM, below its tier of host memory",
        TIER_RELEASES,
        "an object in `secondary_tiers`",
        "vllm_tier.md",
        "page",
    ),
    (
        "transformers",
        RELEASES["transformers"],
        "`cache=OffloadedCache(...)`; below 5.24 `past_key_values=`",
        "transformers.md",
        "page",
    ),
    (
        "transformers, with a disk or a bucket that outlives it",
        RELEASES["transformers"],
        "`PrefixStore(model, terms)`",
        "transformers.md#keep-prefixes-on-a-disk-or-in-a-bucket",
        "page",
    ),
)


def integrations(folder: str = "") -> str:
    """One row for each integration: its releases, what chooses it, and its page."""
    rows = ["| engine | releases | chosen by | |", "|---|---|---|---|"]
    for engine, releases, chosen, page, name in INTEGRATIONS:
        link = f"[{name}]({folder}{page})"
        rows.append(f"| {engine} | {releases.range} | {chosen} | {link} |")
    return "\n".join(rows)


def borne_out() -> support_matrix.SupportMatrix:
    """The matrix; ends the program where its files do not bear it out."""
    try:
        levels = support_matrix.read(MATRIX)
    except ValueError as error:
        sys.exit(str(error))
    wrong = evidence.contradictions(levels, ROOT)
    if wrong:
        sys.exit("\n".join(wrong))
    return levels


#: The tables of each page, by the name in its mark.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "backends": backends,
        "first-token": first_tokens_by_default,
        "integrations": lambda: integrations(f"{FILES}docs/plugs/"),
    },
    ROOT / "docs" / "index.md": {"first-token": first_tokens},
    ROOT / "docs" / "layouts.md": {"layouts": layouts},
    ROOT / "docs" / "hardware.md": {"hardware": hardware},
    ROOT / "docs" / "conformance.md": {"tiers": tiers},
    ROOT / "docs" / "plugs" / "index.md": {"integrations": integrations},
}


def fill(page: Path) -> str:
    """A page's text with its tables written anew."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        parts = re.split(rf"(?s)(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)", text)
        text = f"{table()}\n".join(parts)
        if len(parts) != 2:
            sys.exit(f"{page.name} must hold one `<!-- table: {name} -->` ... `<!-- end -->`.")
    return text


def write() -> None:
    """Write the tables into their pages."""
    for page in PAGES:
        page.write_text(fill(page), encoding="utf-8")


def check() -> None:
    """Fail where a page says something else, naming the lines that should stand there."""
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = fill(page)
        if new == old:
            continue
        due = [line for line in new.splitlines() if line not in old.splitlines()]
        sys.exit(
            f"The tables of {page.relative_to(ROOT)} are stale: a preset, a result or a backend's "
            "source has changed. Run `python .ci/readme_tables.py` and commit the page; to renew "
            "an expired result, run the suite and `python .ci/keep_result.py REPORT`. What should "
            "stand there:\n" + "\n".join(due or ["(only lines that are to go)"])
        )


def main() -> None:
    """Write, or check."""
    check() if "--check" in sys.argv else write()


if __name__ == "__main__":
    main()
