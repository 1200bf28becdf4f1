# SPDX-License-Identifier: Apache-2.0
"""Synthetic runs of the suite, for tests of what is made from a run: no backend is judged here."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from portakv_conformance import SPEC_VERSION, SUITE_VERSION
from portakv_conformance.evidence.support_matrix import RESULTS
from portakv_conformance.evidence.verdict import case_list_sha256, judge
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import SCHEMA, CaseRecord, RunRecord
from portakv_conformance.report.results import keep

LAYOUTS = (
    "vllm-nhd",
    "vllm-hnd",
    "vllm-flashinfer-nhd",
    "vllm-0.26-hnd",
    "vllm-mla-fp8",
    "vllm-dsv4",
    "sglang-mha",
    "sglang-mla",
    "vllm-ascend",
    "vllm-ascend-nz",
    "mlu",
    "flexkv-blockfirst",
    "dynamo-universal",
    "trtllm-hnd",
    "layer kv | block head dim/32 token dim%32",
)
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int64")
OPERATIONS = ("gather", "scatter", "migrate")
# Reasons as the oracle words them.
WRONG = (
    "Destination layer 3 value slot 17 head 0 byte 5 (storage 3, offset 17413) holds 0x9a, which "
    "is source layer 3 key slot 17 head 0 byte 5; expected 0x41, source layer 3 value slot 17 "
    "head 0 byte 5. In all 8192 bytes are wrong.",
    "Destination layer 0 key slot 31 head 7 byte 126 (storage 0, offset 65534) holds 0xee, which "
    "is what stood there before the copy: it was not written; expected 0x07, source layer 0 key "
    "slot 4 head 7 byte 126. In all 2 bytes are wrong.",
    "Destination padding or canary (storage 2, offset 524288) holds 0x1c, which is source layer 1 "
    "key slot 0 head 0 byte 0; expected 0xa5, what was there before: the copy must not write it. "
    "In all 16 bytes are wrong.",
)
_CLAIMS = (
    "guards",
    "skips_negative",
    "capturable",
    "threads",
    "max_loops",
    "alignment",
    "tables",
    "index_dtypes",
    "index_on",
    "places",
)


def _case(id: str, area: str, draw: random.Random, **values: object) -> CaseRecord:
    case = CaseRecord(
        id=id,
        area=area,
        profile="core" if area == "core" else "full",
        seconds=round(draw.uniform(0.002, 0.6), 4),
        examples=draw.choice((1, 1, 4, 40, 120)),
        replay=f"portakv conform acme --device acme --only '{id}'",
    )
    return replace(case, **values)  # type: ignore[arg-type]


def _copies(draw: random.Random) -> list[CaseRecord]:
    made = []
    for number, layout in enumerate(LAYOUTS):
        for dtype in DTYPES:
            if dtype in ("int8", "int64") and number % 3:
                continue
            for operation in OPERATIONS:
                area = "core" if number < 2 else "corners"
                name = f"cases/test_{area}.py::test_{operation}[{layout}-{dtype}]"
                tags = {"layout": layout, "dtype": dtype, "operation": operation}
                made.append(_case(name, area, draw, tags=tags))
    return made


def _others(draw: random.Random) -> list[CaseRecord]:
    """Return cases that are about no layout in particular, and cases about a claim."""
    made = []
    for area, names in {
        "drawn": ("caches", "chunks", "pages", "migrations", "padding"),
        "metamorphic": ("there_and_back", "permuted", "split", "across_backends"),
        "stateful": ("allocate_append_evict_reload",),
        "safety": ("canaries", "poison", "past_the_end", "aliasing", "misaligned_base"),
        "ordering": ("slow_producer", "slow_consumer", "side_stream", "freed_right_away"),
        "capture": ("replay", "padded_with_negative_ids"),
    }.items():
        for name in names:
            for size in ("1", "16", "odd", "large"):
                made.append(_case(f"cases/test_{area}.py::test_{name}[{size}]", area, draw))
    for claim in _CLAIMS:
        for method in ("kept", "denied"):
            name = f"cases/test_claims.py::test_claim_{method}[{claim}]"
            made.append(_case(name, "claims", draw, claim=claim))
    return made


def _run(cases: list[CaseRecord], **values: Any) -> RunRecord:
    made = RunRecord(
        schema=SCHEMA,
        suite=SUITE_VERSION,
        spec=SPEC_VERSION,
        backend={
            "name": "acme",
            "target": "portakv_acme:Acme",
            "version": "1.4.0",
            "source_sha256": hashlib.sha256(b"acme").hexdigest(),
        },
        environment={
            "torch": "2.13.0",
            "python": "CPython 3.11.7",
            "os": "Linux 6.1.0 x86_64",
            "device": "acme",
            "device_name": "Acme XPU 900",
            "driver": "5.2.1",
            "emulated": False,
            "torch_acme": "2.13.0.post1",
        },
        capabilities={
            "places": [["device", "device"], ["device", "pinned"]],
            "index_on": "device",
            "index_dtypes": ["int32", "int64"],
            "skips_negative": True,
            "guards": True,
            "alignment": 1,
            "max_loops": 5,
            "tables": True,
            "capturable": False,
            "threads": True,
            "encodings": [],
        },
        trace=[
            "acme: accepted, Acme XPU 900 with driver 5.2.1",
            "cuda: rejected, device type 'acme' is not 'cuda'",
            "reference: accepted, runs on any torch device",
        ],
        profile="full",
        seed=0,
        fuzz=0,
        case_list_sha256=case_list_sha256(case.id for case in cases),
        cases=cases,
        totals={},
        rung="",
        verdict="",
        missing=[],
        started="2026-11-20T09:41:12+00:00",
        seconds=187.4,
        command="portakv conform acme --device acme --profile full --seed 0 --report out",
    )
    return changed(made, **values)


def passing() -> RunRecord:
    """Return a run that is conformant on a real device, without one of the claims."""
    draw = random.Random(1)
    cases = _copies(draw) + _others(draw)
    for case in cases:
        if case.claim == "capturable":
            case.status = "not-claimed"
            case.reason = "The backend does not claim `capturable`; the plan was refused."
    return _run(cases)


def failing(count: int = 12) -> RunRecord:
    """Return a run with ``count`` failed cases: one crashed, one timed out; two are waived."""
    cases = passing().cases
    others = [n for n, case in enumerate(cases) if case.area not in ("ordering", "capture")]
    hit = [cases[n] for n in sorted(random.Random(2).sample(others, count))]
    for number, case in enumerate(hit):
        case.status = "failed"
        case.reason = WRONG[number % 3]
        case.details = f"test_corners.py:88: in judge\n    raise AssertionError(wrong)\n{'E' * 160}"
    hit[1].reason = "The case ran past its limit of 120 s; the worker was ended."
    hit[1].details = "Stack (most recent call first):\n  File acme.py, line 41 in launch"
    hit[2].status = "error"
    hit[2].reason = "The worker process died with signal 11 (SIGSEGV) in this case."
    hit[3].example = "shrunken-3.json"
    spared = [case for case in cases if case.area == "ordering"][:2]
    for case in spared:
        case.status = "waived"
        case.reason = "Driver 5.2.1 reorders two streams; mended in 5.3."
    waivers = [{"id": case.id, "reason": case.reason, "expires": "2027.02"} for case in spared]
    return _run(cases, waivers=waivers)


def emulated() -> RunRecord:
    """Return a run that is conformant on the simulated device."""
    facts = {
        "device": "simdev",
        "device_name": "simulated device (simdev, on the host's processor)",
        "driver": "",
        "emulated": True,
        "emulation": {"portakv_conformance.simdev": "5" * 64},
        "torch_acme": ...,
    }
    command = "portakv conform acme --device simdev --profile full --seed 0"
    return changed(passing(), facts, command=command)


def incomplete() -> RunRecord:
    """Return a run without failures that could not run a part of the profile."""
    cases = [case for case in passing().cases if case.area != "ordering"]
    return _run(
        cases,
        missing=[
            "The simulated device was not built: no C++ compiler was found; install g++.",
            "Cases on two devices were left out: this machine has one.",
        ],
    )


def hostile() -> RunRecord:
    """Return a run whose every text tries to be markup, a link, a mention, or a character that no
    document takes."""
    bad = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    bad += "\"'&|`@all\x1b[0m\x00"
    run = failing()
    cases = [
        replace(
            case,
            id=f"{case.id}{bad}",
            reason=bad,
            details=bad,
            replay=bad,
            example=bad,
            area=bad,
            tags=dict.fromkeys(case.tags, bad),
        )
        if case.status != "passed"
        else case
        for case in run.cases
    ]
    return replace(
        run,
        cases=cases,
        backend=dict.fromkeys(run.backend, bad),
        trace=[bad],
        missing=[bad],
        environment={**run.environment, "device_name": bad, bad: bad},
        spec=bad,
        capabilities={**run.capabilities, bad: [bad]},
        command=bad,
        waivers=[{"id": bad, "reason": bad, "expires": "2027.02"}],
        started=bad,
    )


RUNS = {each.__name__: each for each in (passing, failing, emulated, incomplete, hostile)}


def changed(run: RunRecord, *facts: dict[str, Any], **values: Any) -> RunRecord:
    """Return the run with other values and facts of its environment, judged again; ``...`` leaves a
    fact out."""
    run = replace(run, **values)
    for reported in facts:
        run.environment |= reported
    run.environment = {name: fact for name, fact in run.environment.items() if fact is not ...}
    judge(run)
    return run


def refusals(run: RunRecord) -> str:
    """Return the findings of `verify` about a run, whose cases no suite has to know."""
    return "\n".join(check_report(run.document(), lambda profile, device: {}))


def saved_report(run: RunRecord, root: Path) -> Path:
    """Save a run's report among the results below a folder and return its file. `verify` does not
    check the cases against a suite."""
    report = root / "conformance.json"
    report.write_text(run.document())
    return keep(report, root / RESULTS, lambda text: [])
