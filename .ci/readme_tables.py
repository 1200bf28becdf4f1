# SPDX-License-Identifier: Apache-2.0
"""Write the generated tables of the README and of some pages of docs/.

With ``--check`` fail where they are stale.

The tables of first tokens and of steps come from the newest results of each model, as
`benchmarks/notes/figures.md` does, the one of hand-overs from another file in their folder.
``--picture`` draws the first tokens as well.
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
from itertools import chain
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
#: The newest results of each model in vLLM: all answers of one model are of one file.
ENGINES = (
    "benchmarks/results/parts/h200-engines-8b-mla.json",
    "benchmarks/results/parts/h200-engines-8b-cross-layer.json",
    "benchmarks/results/parts/h200-engines-rank-20-pairs.json",
)
HANDOVERS = "benchmarks/results/parts/h100-x2-engines-handover.json"

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
    rows = measured("engine_prompt", *ENGINES)
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


#: All models of the benchmark of engines, as its results call them.
ALL_MODELS = (
    *MODELS,
    "one of eight ranks of Llama-3-8B",
    "DeepSeek-V2-Lite's attention (MLA), dense layers",
)
#: The columns of the table of known prompts.
PROMPTS = (*FIRST_TOKENS, ("the GPU's own cache", "off", "device hit"))
#: The columns of the table of steps: what comes in while 16 requests decode.
STEPS = (
    ("no other prompts", "nothing comes in"),
    ("known prompts arrive", "hits come in"),
    ("new prompts arrive, and are stored", "cold come in"),
)


def measured(kind: str, *files: str) -> list[JsonObject]:
    """The rows of a kind in files of results whose answers were right."""
    recorded = [json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"] for file in files]
    return [row for row in chain(*recorded) if row["kind"] == kind and row["verified"]]


def draw() -> None:
    """Draw the times of the table of known prompts."""
    from portakv_benchmarks.shared import plots

    rows = measured("engine_prompt", *ENGINES)
    rows = [row for row in rows if row["backend"] != "portakv disk"]
    rows.sort(key=lambda row: ALL_MODELS.index(row["shape"].partition(", ")[2]))
    results: JsonObject = {"rows": rows, "machine": {"device": "NVIDIA H200"}}
    plots.draw(results, ROOT / "benchmarks" / "results" / "parts", "h200-engines")


def known_prompts() -> str:
    """One row for each model: ms until the first token of its prompts, of both lengths."""
    rows = measured("engine_prompt", *ENGINES)
    by = {(row["shape"], row["backend"], row["op"]): row for row in rows}
    lengths = sorted({row["tokens"] for row in rows})
    heads = [words for words, *_ in PROMPTS]
    heads.insert(len(FIRST_TOKENS), "PortaKV / vLLM's")
    title = f"ms, {' / '.join(f'{tokens:,}' for tokens in lengths)} tokens"
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for model in ALL_MODELS:
        cells = []
        for _, connector, part in PROMPTS:
            answers = [by[f"{tokens} tokens, {model}", connector, part] for tokens in lengths]
            cells.append(" / ".join(_three_digits(row["p50_ms"]) for row in answers))
            if connector.startswith("portakv"):
                cells.append(" / ".join(f"{row['of_own']:.2f}" for row in answers))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps() -> str:
    """One row for each model: ms of a step of its engine, by connector."""
    rows = measured("engine_decode", *ENGINES)
    by = {(row["shape"].partition(" come in, ")[2], row["backend"], row["op"]): row for row in rows}
    heads = " | ".join(words for words, _ in STEPS)
    lines = [
        f"| no connector / vLLM's offloading / PortaKV | {heads} |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for model in ALL_MODELS:
        cells = [
            " / ".join(
                f"{by[model, connector, op]['mean_ms']:.2f}" for _, connector, _ in FIRST_TOKENS
            )
            for _, op in STEPS
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def handovers() -> str:
    """One row for each length of a prompt: ms until the first token of the engine that goes on."""
    rows = measured("engine_handover", HANDOVERS)
    by = {(row["tokens"], row["backend"], row["op"]): row for row in rows}
    lines = [
        "| tokens of the prompt | PortaKV, blocks of 16 to 64 | NixlConnector | computed again |",
        "|---|---|---|---|",
    ]
    for tokens in sorted({row["tokens"] for row in rows}):
        answers = [
            by[tokens, "portakv", "blocks 16 -> 64"],
            by[tokens, "nixl", "blocks 16 -> 16"],
            by[tokens, "off", "recompute"],
        ]
        times = [f"{_three_digits(row['p50_ms'])} ms" for row in answers]
        lines.append(f"| {tokens:,} | {' | '.join(times)} |")
    return "\n".join(lines)


def _three_digits(milliseconds: float) -> str:
    """A time with one decimal below 50 ms, and without one above."""
    return f"{milliseconds:.1f}" if milliseconds < 50 else f"{milliseconds:,.0f}"


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


#: Rows of the table of integrations: the wish, its engine and releases, what chooses the
#: integration, and its page.
INTEGRATIONS = (
    (
        "blocks of vLLM in host memory, on a disk or in a bucket",
        RELEASES["vllm"],
        "`kv_connector` and its module",
        "vllm.md#keep-blocks-on-an-nvme-disk",
    ),
    (
        "prefill and decode in two engines of vLLM",
        RELEASES["vllm"],
        "the same and `kv_role`",
        "vllm.md#prefill-and-decode",
    ),
    (
        "a disk below vLLM's tier of host memory",
        TIER_RELEASES,
        "an object in `secondary_tiers`",
        "vllm.md#a-disk-below-vllms-tiers",
    ),
    (
        "another worker for vLLM's offloading",
        RELEASES["vllm"],
        "`spec_name` and its module",
        "vllm.md#the-offloading-worker",
    ),
    (
        "proof that any connector of vLLM loads the right rows",
        RELEASES["vllm"],
        "`kv_connector` and its module",
        "vllm.md#prove-what-another-connector-loads",
    ),
    (
        "a disk for LMCache's MP server",
        RELEASES["lmcache"],
        '`--l2-adapter` with `"type": "plugin"`',
        "lmcache.md#a-disk-for-the-mp-server",
    ),
    (
        "LMCache's transfers on any device",
        RELEASES["lmcache"],
        "`LMCACHE_DEVICE_BACKEND=portakv-cuda`",
        "lmcache.md#transfers",
    ),
    (
        "SGLang's HiCache on a disk or in a bucket",
        RELEASES["sglang"],
        "`--hicache-storage-backend dynamic`",
        "sglang.md#store-pages-on-a-disk-or-in-a-bucket",
    ),
    ("transfers of SGLang's HiCache", RELEASES["sglang"], "`PORTAKV_SGLANG=1`", "sglang.md"),
    (
        "prefixes of transformers on a disk or in a bucket",
        RELEASES["transformers"],
        "`PrefixStore(model, terms)`",
        "transformers.md#keep-prefixes-on-a-disk-or-in-a-bucket",
    ),
    (
        "a cache of transformers that leaves the device",
        RELEASES["transformers"],
        "`cache=OffloadedCache(...)`; below 5.24 `past_key_values=`",
        "transformers.md",
    ),
)


def integrations(folder: str = "") -> str:
    """One row for each integration: its page, its releases, and what chooses it."""
    rows = ["| you want | releases | chosen by |", "|---|---|---|"]
    for wish, releases, chosen, page in INTEGRATIONS:
        rows.append(f"| [{wish}]({folder}{page}) | {releases.range} | {chosen} |")
    return "\n".join(rows)


@cache
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
        "integrations": lambda: integrations(f"{FILES}docs/engines/"),
    },
    ROOT / "docs" / "index.md": {"first-token": first_tokens},
    ROOT / "docs" / "layouts.md": {"layouts": layouts},
    ROOT / "docs" / "hardware.md": {"hardware": hardware},
    ROOT / "docs" / "conformance.md": {"tiers": tiers},
    ROOT / "docs" / "engines" / "index.md": {
        "integrations": integrations,
        "known-prompts": known_prompts,
    },
    ROOT / "docs" / "engines" / "vllm.md": {"handover": handovers, "steps": steps},
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
    if "--picture" in sys.argv:
        draw()


if __name__ == "__main__":
    main()
