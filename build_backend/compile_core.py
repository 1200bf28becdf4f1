# SPDX-License-Identifier: Apache-2.0
"""Compile `native/core` into the one shared library that `portakv.core` loads.

    python build_backend/compile_core.py                the library of this clone, unless current
    python build_backend/compile_core.py --force        the same, also if it is current
    python build_backend/compile_core.py --target aarch64 --output FILE
                                                        with ziglang, for any Linux since glibc 2.17
    python build_backend/compile_core.py --output FILE --flag=-fsanitize=address
                                                        with more flags, for a checker

It needs Python and a C++17 compiler, and neither packages nor a network. The compiler is the first
of $CXX, c++, g++ and clang++ that links a small file, else the package `ziglang`. The latter
compiles its C++ runtime each time, unless $ZIG_GLOBAL_CACHE_DIR names a folder that keeps it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "native" / "core"
PACKAGE = ROOT / "src" / "portakv" / "core"
LIBRARY = PACKAGE / "libportakv_core.so"
#: Exactly one release: a file of constraints does not reach the environment of a build.
ZIGLANG = "ziglang==0.17.1"
#: The architectures that releases are built for.
ARCHITECTURES = ("x86_64", "aarch64")
#: The oldest glibc that a library of ziglang needs.
GLIBC = "2.17"
LANGUAGE = ["-std=c++17"]
CODE = ["-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"]
WARNINGS = ["-Wall", "-Wextra"]
#: The linker exports these names alone, and hides the templates of the standard library, which its
#: headers mark as visible.
EXPORTS = "{ global: portakv_*; local: *; };\n"
#: A compiler counts if it links this.
PROBE = """
#include <thread>
#include <vector>

int main() {
    std::vector<int> numbers(2);
    std::thread([&numbers] { numbers.push_back(1); }).join();
    return static_cast<int>(numbers.size()) - 3;
}
"""

if TYPE_CHECKING:
    from portakv.core import sources
else:
    # By its path, since neither PortaKV nor torch is installed yet.
    _spec = importlib.util.spec_from_file_location("portakv_sources", PACKAGE / "sources.py")
    sources = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sources)


class CannotCompile(Exception):
    """The library cannot be built; the message says what to do."""


def compiler() -> list[str] | None:
    """Return the command of the first local compiler that links C++17; None: none does."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]) and links(command):
            return command
    return None


def links(command: list[str]) -> bool:
    """Return True if a compiler makes a program of a file that uses threads and containers."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cpp")
        source.write_text(PROBE)
        program = str(Path(scratch, "probe"))
        probe = [*command, *LANGUAGE, "-O2", "-pthread", str(source), "-o", program]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def ziglang(architecture: str) -> list[str] | None:
    """Return the command of the installed package `ziglang`; None: it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    command = [sys.executable, "-m", "ziglang", "c++"]
    if sys.platform == "linux" and architecture in ARCHITECTURES:
        command += ["-target", f"{architecture}-linux-gnu.{GLIBC}"]
    return command


def command_for(target: str) -> list[str]:
    """Return the compiler's command.

    Args:
        target: an architecture, for a library of ziglang that any Linux loads; empty: this machine,
            with its own compiler if it has one.

    Raises:
        CannotCompile: there is no compiler, or an unknown architecture.
    """
    if target and target not in ARCHITECTURES:
        raise CannotCompile(
            f"Expected a target of {', '.join(ARCHITECTURES)}, got {target!r}. Pass one of them."
        )
    command = None if target else compiler()
    command = command or ziglang(target or platform.machine())
    if command is None and target:
        raise CannotCompile(
            f"Expected the package ziglang to build PortaKV's core for {target}, got none. Run "
            f"`pip install {ZIGLANG}`."
        )
    if command is None:
        raise CannotCompile(
            "Expected a C++17 compiler to build PortaKV's core, got none. Install g++, or run "
            f"`pip install {ZIGLANG}`."
        )
    return command


def is_current(library: Path = LIBRARY) -> bool:
    """Return True if a library loads here and is built from the sources as they are now."""
    if not library.exists():
        return False
    try:
        function = ctypes.CDLL(str(library)).portakv_core_sources
    except (OSError, AttributeError):
        return False
    function.restype = ctypes.c_char_p
    return bool(function().decode() == sources.hash_of(SOURCES))


def build(output: Path = LIBRARY, target: str = "", flags: Sequence[str] = ()) -> None:
    """Compile all sources in parallel, and replace the library in one step.

    Args:
        output: the library's file.
        target: as in `command_for`.
        flags: more flags for the compiler and the linker.

    Raises:
        CannotCompile: there is no compiler, or it fails.
    """
    command = command_for(target)
    with tempfile.TemporaryDirectory() as scratch:
        objects = compile_all(command, Path(scratch), flags)
        exports = Path(scratch, "exports.map")
        exports.write_text(EXPORTS)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the library, since a file moves in one step within one file system only.
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            link = [*command, *linking(exports), *flags, *objects, "-o", str(temporary)]
            run(link, Path(scratch))
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)


def compile_all(command: list[str], folder: Path, flags: Sequence[str]) -> list[str]:
    """Compile each source into an object file in ``folder``, and return the files."""
    define = f'-DPORTAKV_CORE_SOURCES="{sources.hash_of(SOURCES)}"'
    # So that the folder of the build is not in the library.
    prefix = f"-ffile-prefix-map={SOURCES}=core"
    common = [*command, *LANGUAGE, *CODE, *WARNINGS, prefix, define, *flags]
    units = [path for path in sources.sources_of(SOURCES) if path.suffix == ".cpp"]
    objects = [str(folder / f"{number}.o") for number in range(len(units))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = []
        for unit, made in zip(units, objects, strict=True):
            started.append(pool.submit(run, [*common, "-c", str(unit), "-o", made], folder))
        for each in started:
            each.result()
    return objects


def linking(exports: Path) -> list[str]:
    """Return the flags that make a shared library here, with the same bytes each time."""
    if sys.platform == "darwin":
        return ["-dynamiclib", "-Wl,-dead_strip", "-Wl,-install_name,@rpath/libportakv_core.so"]
    if sys.platform != "linux":
        return ["-shared"]
    return [
        "-shared",
        "-pthread",
        # The library brings its C++ runtime, since that of another machine may be older.
        "-static-libstdc++",
        "-static-libgcc",
        f"-Wl,--version-script={exports}",
        "-Wl,--gc-sections",
        "-Wl,--build-id=none",
        "-Wl,-z,defs",
        "-Wl,-s",
        "-ldl",
    ]


def run(command: list[str], scratch: Path) -> None:
    """Run a compiler; print its warnings.

    Raises:
        CannotCompile: it fails; the message has its output.
    """
    # Not in the home folder, which may be read-only.
    around = {"ZIG_GLOBAL_CACHE_DIR": str(scratch / "zig"), **os.environ}
    done = subprocess.run(
        command,
        env=around,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CannotCompile(
            f"Expected `{shlex.join(command)}` to succeed, got status {done.returncode}:\n"
            f"{done.stdout}"
        )
    if done.stdout:
        print(done.stdout, file=sys.stderr, end="")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--force", action="store_true", help="build also if it is current")
    parser.add_argument("--target", default="", help="x86_64 or aarch64: build with ziglang")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library's file")
    parser.add_argument("--flag", action="append", default=[], help="one more flag")
    args = parser.parse_args(words)
    plain = not args.target and not args.flag
    if plain and not args.force and is_current(args.output):
        print(f"{args.output} is current")
        return 0
    try:
        build(args.output, args.target, args.flag)
    except CannotCompile as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
