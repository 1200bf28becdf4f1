# SPDX-License-Identifier: Apache-2.0
"""The faults that a witness was shown in real engines, as a result file.

    python -m pytest -o junit_family=xunit1 --junitxml FAULTS.xml ... test_vllm_cpu_witness.py
    PYTHONPATH=tests python -m support.witness_results FAULTS.xml >FAULTS.json

A test records a row for each fault and connector; the rows of tests that failed are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from portakv.integrations import installed
from portakv_benchmarks.cli import RESULT_FORMAT, describe

#: The name of the property that a test records.
ROW = "witness row"
#: The connectors that those of `support.witness_shim` damage.
DAMAGED = {
    "DamagedPortaKV": "PortaKVConnector",
    "DamagedExample": "ExampleConnector",
    "DamagedOffloading": "OffloadingConnector",
    "DamagedSimple": "SimpleCPUOffloadConnector",
}


def record(record_property: Callable[[str, object], None], connector: str, **row: Any) -> None:
    """Record a row of the test that has this fixture of pytest."""
    name = DAMAGED.get(connector, connector)
    record_property(ROW, json.dumps({"kind": "witness_fault", "connector": name, **row}))


def rows_in(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of the tests that passed, in the files that pytest has written."""
    rows = list[dict[str, Any]]()
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if case.find("failure") is None and case.find("error") is None:
                properties = case.iter("property")
                rows += [json.loads(x.attrib["value"]) for x in properties if x.get("name") == ROW]
    return rows


def main() -> None:
    """Print the result of the files on the command line."""
    releases = {"vllm-cpu": (installed("vllm") or ("", ""))[1]}
    result = {
        "format": RESULT_FORMAT,
        "suite": "engines",
        "name": "cpu-2core-engines-witness-faults",
        "machine": {**describe(torch.device("cpu")), **releases},
        "asked": {"parts": ["faults"]},
        "rows": rows_in(map(Path, sys.argv[1:])),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
