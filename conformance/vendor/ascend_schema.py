# SPDX-License-Identifier: Apache-2.0
"""The schema job: `portakv.backends.ascend` against the vendor's own torch_npu, without an NPU.

``python -m portakv_conformance.vendor.ascend_schema --report out`` makes a separate environment,
installs torch and the vendor's wheel there, builds stub libraries in place of CANN, compares the
schemas of every op that the backend calls with the pinned ones, and runs the suite through the
vendor's dispatcher. The kernels of the ops are torch's: this shows that calls are well formed
and rows land where they should if the ops do what their documents say. It shows nothing about an
NPU. Once the AscendC kernel, emulated, is launched on a stream of torch_npu's. Needs Linux, gcc,
g++, binutils, the network for pip, and a minute or two.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from portakv.backends.ascend_kernel import VARIABLE
from portakv.runtime.kernel_cache import directory
from portakv_conformance.evidence import support_matrix
from portakv_conformance.evidence.environment import hashed
from portakv_conformance.evidence.evidence import name_of
from portakv_conformance.record import JsonObject
from portakv_conformance.report.results import keep, read
from portakv_conformance.vendor import ascend_device, cann_stub, standins

TORCH = "2.13.0"
TORCH_NPU = "2.13.0"
#: The report of this job; the suite's own report lies next to it.
REPORT = "ascend-schema.json"
BACKEND = "portakv.backends.ascend:Ascend"
COMMAND = "python -m portakv_conformance.vendor.ascend_schema"
SENTENCE = (
    "Accepted by torch_npu's own schemas and dispatcher over a stub of CANN; the kernels of "
    "its ops are torch's, on the host. No NPU was involved."
)
_NEEDS = (
    f"torch=={TORCH}",
    "numpy",
    "pytest",
    "hypothesis",
    "msgspec",
    'tomli; python_version < "3.11"',
)
_PACKAGES = ("portakv", "portakv_conformance", "portakv_native")
_SECONDS = 1800
_ENTER = "portakv_conformance.vendor.ascend_device:enter"


class JobError(RuntimeError):
    """The job could not be done; the message is a sentence that says what failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do the job; return 0 if every schema is as pinned and the suite passes, else 1."""
    args = _parser().parse_args(argv)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="portakv-ascend-") as work:
            report = _judge(args, Path(work), args.report)
    except (JobError, cann_stub.StubError) as error:
        print(f"ascend_schema: {error}", file=sys.stderr)
        return 1
    report["seconds"] = round(time.monotonic() - began)
    target = args.report / REPORT
    target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(report, target)
    return 0 if right(report) else 1


def right(report: JsonObject) -> bool:
    """Return True if a report supports R2 and R3: every check passed."""
    rows = [row["same"] for row in report["schemas"]] + [row["right"] for row in report["refusals"]]
    rows += [report.get("kernel", {}).get("right", False)] if rows else []
    return bool(rows) and all(rows) and report["conformance"]["verdict"] == "conformant"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    add(
        "--venv",
        type=Path,
        default=directory() / "ascend-venv",
        metavar="DIR",
        help="the environment; made if it is not there, kept for the next time",
    )
    add("--report", type=Path, default=Path("out"), metavar="DIR", help="where reports go")
    add("--profile", choices=("core", "full"), default="full", help="of the suite (default: full)")
    return parser


def _judge(args: argparse.Namespace, work: Path, report: Path) -> JsonObject:
    report.mkdir(parents=True, exist_ok=True)
    python = args.venv.absolute() / "bin" / "python"
    wheel = _environment(args.venv, python)
    paths = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    raising = cann_stub.build(Path(paths.strip()), work / "cann")
    variables = {**os.environ, **cann_stub.environment(work / "cann"), **_variables(work)}
    checks = run([str(python), "-m", f"{__package__}.ascend_checks"], variables)
    suite = _suite(python, variables, args.profile, report.absolute())
    calls: Counter[str] = Counter()  # of each op, in all processes of the suite
    for file in (work / "calls").glob("*.json"):
        calls.update(json.loads(file.read_text(encoding="utf-8")))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    made = {
        "job": "ascend-schema",
        "emulated": True,
        "says": SENTENCE,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": f"{COMMAND} --profile {args.profile} --report out",
        "wheel": {"file": wheel.name, "sha256": digest},
        **json.loads(checks),
        "cann_stub_raises": raising,
        "conformance": suite,
        "ops_called": dict(sorted(calls.items())),
    }
    # What the matrix reads of a record (portakv_conformance.evidence.evidence).
    return {
        **made,
        "what": "accepted by the vendor's schemas",
        "right": right(made),
        "name": name_of(BACKEND),
        "backend": BACKEND,
        "source_sha256": suite["source_sha256"],
        "device": "npu, emulated",
        "versions": f"torch-npu {made['torch_npu']}, torch {made['torch']}",
        "vendor": {wheel.name: digest},
        "emulation": hashed([_ENTER.partition(":")[0], f"{__package__}.ascend_checks"]),
    }


def _environment(venv: Path, python: Path) -> Path:
    """Make the environment if it is not whole; returns the vendor's wheel."""
    wheels = venv / "wheels"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", *_NEEDS])
    if not list(wheels.glob("torch_npu-*.whl")):
        run([*pip, "download", "--no-deps", "--dest", str(wheels), f"torch_npu=={TORCH_NPU}"])
    [wheel] = wheels.glob("torch_npu-*.whl")
    check_wheel(wheel, support_matrix.read().vendor)
    run([*pip, "install", "--no-deps", str(wheel)])
    return wheel


def check_wheel(wheel: Path, known: Mapping[str, str]) -> str:
    """The sha256 of a wheel; `JobError` if another one is known of its file name."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    expected = known.get(wheel.name, digest)
    if digest != expected:
        raise JobError(
            f"{wheel.name} has the sha256 {digest}, and the vendor's wheel of that name has "
            f"{expected} ([vendor] in conformance/support_matrix.toml). Nothing was installed: "
            f"delete {wheel} and run the job again; if the vendor now publishes another wheel "
            f"under that name, record it in support_matrix.toml"
        )
    return digest


def _variables(work: Path) -> dict[str, str]:
    """Return the environment of the processes inside, with this library's packages."""
    site = work / "site"
    calls = work / "calls"
    site.mkdir()
    calls.mkdir()
    for name in _PACKAGES:
        installed = Path(str(importlib.import_module(name).__file__)).parent
        (site / name).symlink_to(installed, target_is_directory=True)
    command = Path(str(importlib.import_module("portakv_command").__file__))
    (site / command.name).symlink_to(command)
    return {
        "PYTHONPATH": str(site),
        standins.EMULATION: _ENTER,
        ascend_device.CALLS: str(calls),
        "PYTHONWARNINGS": "ignore",
        VARIABLE: "",  # this job is about the ops
    }


def _suite(python: Path, variables: dict[str, str], profile: str, report: Path) -> JsonObject:
    """Run the suite; what its report says of itself."""
    command = ["-m", "portakv", "conform", "ascend", "--device", "npu", "--emulated"]
    command += ["--profile", profile, "--report", str(report)]
    done = run([str(python), *command], variables, accepted=(0, 1))
    file = report / "conformance.json"
    if not file.is_file():
        raise JobError(f"The suite left no report. It printed: {done.strip()}")
    retained = keep(file, report)  # as it can be committed
    record = read(retained)
    return {
        "file": retained.name,
        "sha256": hashlib.sha256(retained.read_bytes()).hexdigest(),
        "verdict": record.verdict,
        "rung": record.rung,
        "suite": record.suite,
        "profile": record.profile,
        "source_sha256": record.backend["source_sha256"],
        "cases": dict(sorted(Counter(case.status for case in record.cases).items())),
    }


def run(
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    accepted: Sequence[int] = (0,),
) -> str:
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    if done.returncode not in accepted:
        ending = f"{done.returncode}: {done.stderr.strip()[-2000:]}"
        raise JobError(f"{' '.join(command[:6])} ended with {ending}")
    return done.stdout or done.stderr


def _print(report: JsonObject, file: Path) -> None:
    for row in report["schemas"]:
        print(f"{'same     ' if row['same'] else 'DIFFERENT'} {row['op']}{row['found']}")
    for row in report["refusals"]:
        print(f"{'refused  ' if row['right'] else 'WRONG    '} {row['call']}: {row['said'][:80]}")
    kernel = report["kernel"]
    suite = report["conformance"]
    print(f"{'launched ' if kernel['right'] else 'WRONG    '} {kernel['said']}, emulated on a CPU")
    cases = ", ".join(f"{count} {status}" for status, count in suite["cases"].items())
    print(f"{suite['verdict']}, {suite['rung']} (emulated), suite {suite['suite']}: {cases}")
    print(f"{SENTENCE}\nwrote {file} in {report['seconds']} s")


if __name__ == "__main__":
    sys.exit(main())
