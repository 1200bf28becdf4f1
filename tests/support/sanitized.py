# SPDX-License-Identifier: Apache-2.0
"""Run the tests of the compiled core under sanitizers, then draw further cases.

    python tests/support/sanitized.py                 the tests, then a minute of drawn cases
    python tests/support/sanitized.py --seconds 3600  the tests, then an hour of drawn cases
    python tests/support/sanitized.py --drawn         a minute of drawn cases alone
    python tests/support/sanitized.py --seed 7        the cases of one seed
    python tests/support/sanitized.py --build FILE    the library alone, which needs no packages
    python tests/support/sanitized.py --library FILE  the same with a library of --build

The library is built with the address and the undefined-behaviour sanitizer into a copy of the
package. Views, ids, plans, pieces, checksums, copies in slices, and chunks and rows that kernels
copy are drawn and judged as the tests do it. Each round has a seed of its own, which is printed
before it begins. One round is drawn in any case.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Instrumented code is optimized less: its build takes a quarter less, and its cases as long.
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1")
#: The tests that call the core; the others build it.
TESTS = (
    *("core/test_checked_copies.py", "core/test_core_view.py", "core/test_ids.py"),
    *("core/test_pack.py", "core/test_plan.py", "core/test_runs.py", "core/test_rows.py"),
    *("core/test_xxh3.py", "connector/test_connector.py", "copy/test_inside.py"),
    *("interconnect/test_direct_whole.py", "interconnect/test_submission.py"),
    *("interconnect/test_pick.py", "interconnect/test_costs.py", "runtime/test_ends.py"),
    *("storage/test_engine.py", "storage/test_ring.py", "view/test_slicing.py"),
)
#: Tests of hypothesis that a round runs with its seed, in so many examples each.
EXAMPLES = 300


def sanitizers() -> list[str]:
    """Return the libraries that have to be loaded first; empty: the compiler has none of them.

    The sanitizer looks for the function that throws exceptions when it starts.
    """
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found.append(done.stdout.strip())
    return found if all(map(os.path.isabs, found)) else []


def compile_core(output: Path, tree: Path = ROOT) -> None:
    """Compile the sources of a tree into a sanitized library."""
    command = [sys.executable, str(tree / "build_backend" / "compile_core.py")]
    command += ["--output", str(output), *(f"--flag={flag}" for flag in FLAGS)]
    subprocess.run(command, check=True)


def build(folder: Path, tree: Path = ROOT, library: Path | None = None) -> dict[str, str]:
    """Make a copy of the package with a sanitized library; return the environment that loads it.

    ``tree`` has the sources of the library, unless ``library`` is one.
    """
    shutil.copytree(ROOT / "portakv", folder / "portakv")
    for name in ("portakv_conformance", "portakv_native"):
        (folder / name).symlink_to((ROOT / "src" / name).resolve())
    output = folder / "portakv/core/libportakv_core.so"
    if library is None:
        compile_core(output, tree)
    else:
        shutil.copyfile(library, output)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizers()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }


def rounds(seconds: float, seed: int | None) -> None:
    """Draw cases for so many seconds, in this process; those of one seed if there is one."""
    import portakv.core.library

    assert ROOT not in Path(portakv.core.library.__file__).parents, "the library is not sanitized"
    began = time.monotonic()
    number = 0
    while not number or (seed is None and time.monotonic() - began < seconds):
        chosen = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        print(f"seed {chosen}", flush=True)
        for draw in draws(chosen):
            draw()
        number += 1
    print(f"{number} rounds, no fault", flush=True)


def draws(seed: int) -> list[Callable[[], object]]:
    """Return what a round of one seed runs."""
    import hypothesis

    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "drawn", max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("drawn")
    # These take the profile.
    from core import (
        test_checked_copies,
        test_core_view,
        test_ids,
        test_pack,
        test_plan,
        test_runs,
        test_xxh3,
    )
    from interconnect import test_direct_whole, test_submission

    sys.path.append(str(ROOT / "tests" / "copy"))  # `copy` is a module of Python
    inside = importlib.import_module("test_inside")
    chance = random.Random(seed)
    return [
        lambda: [test_core_view.check_drawn(chance) for _ in range(EXAMPLES)],
        lambda: test_plan.check_drawn(seed, EXAMPLES),
        lambda: test_pack.check_drawn(seed, EXAMPLES),
        lambda: test_xxh3.check_all_drawn(chance, EXAMPLES),
        hypothesis.seed(seed)(test_ids.test_the_core_does_what_the_definition_says),
        hypothesis.seed(seed)(test_ids.test_long_lists_dense_and_far_apart),
        hypothesis.seed(seed)(test_runs.test_pieces_are_the_copy),
        hypothesis.seed(seed)(test_checked_copies.test_launches_by_units),
        hypothesis.seed(seed)(test_checked_copies.test_chunks_by_units),
        hypothesis.seed(seed)(test_submission.test_every_byte_in_every_order),
        hypothesis.seed(seed)(test_direct_whole.test_bytes_are_those_of_numpy),
        by_kernels(hypothesis.seed(seed)(inside.test_bytes_are_those_of_torch)),
        by_kernels(hypothesis.seed(seed)(inside.test_rows_by_any_ids_end_as_on_the_general_way)),
    ]


def by_kernels(test: Callable[[], object]) -> Callable[[], object]:
    """Return a test of copies by kernels that g++ compiles, with the backend that it names."""
    from portakv.registry.registry import REGISTRY
    from support.cuda_on_cpu import CudaOnCpu

    def run() -> None:
        REGISTRY.register(CudaOnCpu.name, CudaOnCpu)
        try:
            test()
        finally:
            REGISTRY.unregister(CudaOnCpu.name)

    return run


def main() -> int:
    """Build, run the tests, draw; return the exit code of what failed first, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of drawn cases")
    parser.add_argument("--drawn", action="store_true", help="run no tests")
    parser.add_argument("--seed", type=int, help="draw the cases of one seed; run no tests")
    parser.add_argument("--build", type=Path, metavar="FILE", help="write the library; run nothing")
    parser.add_argument("--library", type=Path, metavar="FILE", help="that --build wrote")
    parser.add_argument("--rounds", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds:
        rounds(args.seconds, args.seed)
        return 0
    if not sanitizers():
        print("g++ has no sanitizers here: nothing was run")
        return 0
    if args.build is not None:
        compile_core(args.build.absolute())
        return 0
    with tempfile.TemporaryDirectory(prefix="portakv-sanitized-") as folder:
        environment = build(Path(folder), library=args.library)
        words = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        words += ["-c", str(ROOT / "pyproject.toml")]
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        own = [str(Path(__file__)), "--rounds"]

        def run(*command: str) -> int:
            """Run a command outside of the clone, whose package would come first."""
            command = (sys.executable, *command)
            return subprocess.run(command, env=environment, cwd=folder, check=False).returncode

        if args.seed is not None:
            return run(*own, f"--seed={args.seed}")
        failed = 0 if args.drawn else run(*words, *tests)
        return failed or run(*own, f"--seconds={args.seconds}")


if __name__ == "__main__":
    sys.exit(main())
