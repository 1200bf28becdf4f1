# SPDX-License-Identifier: Apache-2.0
"""The rows of a result: what requests of an engine waited for, with each connector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple, TypeAlias

from portakv_benchmarks.engines.models import Model
from portakv_benchmarks.shared.harness import Row, Rows, short

#: No connector, vLLM's own offloading, and PortaKV's connector with each tier.
OFF = "off"
OWN = "vllm"
HOST = "portakv host"
DISK = "portakv disk"
PACKED = "portakv packed"
#: Of the part that decodes: requests, and prompts that come in meanwhile.
DECODING = 16
INCOMING = 6


class Served(NamedTuple):
    """A prompt that was computed, found by the engine and found by a connector; milliseconds."""

    cold: float
    device_hit: float
    hit: float
    right: bool


#: Prompts by connector and length.
AllServed: TypeAlias = Mapping[tuple[str, int], Sequence[Served]]


def rows_of_prompts(model: Model, served: AllServed, first: Mapping[str, float]) -> Rows:
    """Return a row for each part of a kind of prompt and each connector.

    ``first``: milliseconds of the first long prompt of an engine's life, by connector.
    """
    rows: Rows = []
    for (name, length), prompts in served.items():
        for part in ("cold", "device_hit", "hit"):
            took = [getattr(each, part) for each in prompts]
            row: Row = {
                "kind": "engine_prompt",
                "shape": f"{length} tokens, {model.shape}",
                "tokens": length,
                "backend": name,
                "op": "recompute" if (name, part) == (OFF, "hit") else part.replace("_", " "),
                "p50_ms": short(median(took)),
                "least_ms": short(min(took)),
                "most_ms": short(max(took)),
                "rounds": len(took),
                "verified": all(each.right for each in prompts),
            }
            if part == "cold" and length == model.prompts[-1]:
                row["first_ms"] = short(first[name])
            rows.append(row | _ratios_of(part, name, served, length))
    return rows


def _ratios_of(part: str, name: str, served: AllServed, length: int) -> dict[str, float]:
    """Return the median ratios of pairs: to vLLM's own tier, to no connector, and of packed rows
    to raw ones."""
    ratios = dict[str, float]()
    prompts = served[name, length]
    others = [(OWN, "of_own"), (OFF, "of_off")]
    if name == PACKED:
        others.append((HOST, "of_raw"))
    for other, field in others:
        if other != name and (other, length) in served:
            pairs = zip(prompts, served[other, length], strict=True)
            ratios[field] = short(median(getattr(a, part) / getattr(b, part) for a, b in pairs))
    if part == "hit" and name != OFF:
        ratios["above_device_hit_ms"] = short(median(x.hit - x.device_hit for x in prompts))
    return ratios


#: Milliseconds of the steps of each run, by connector and by what comes in.
AllSteps: TypeAlias = Mapping[tuple[str, str], Sequence[Sequence[float]]]


def rows_of_steps(model: Model, steps: AllSteps) -> Rows:
    """Return a row for the steps with each connector while nothing, hits or new prompts come in."""
    rows: Rows = []
    means = {key: median(mean(took) for took in runs) for key, runs in steps.items()}
    for (name, what), runs in steps.items():
        row: Row = {
            "kind": "engine_decode",
            "shape": f"{DECODING} requests decode, {INCOMING} prompts come in, {model.shape}",
            "backend": name,
            "op": f"{what} comes in" if what == "nothing" else f"{what} come in",
            "mean_ms": short(means[name, what]),
            "p50_ms": short(median(median(took) for took in runs)),
            "most_ms": short(max(max(took) for took in runs)),
            "rounds": len(runs),
            "verified": True,
        }
        if name != OWN and (OWN, what) in means:
            row["of_own"] = short(means[name, what] / means[OWN, what])
        rows.append(row)
    return rows
