# SPDX-License-Identifier: Apache-2.0
"""The compiled core: how it is built, loaded and rejected, and what it exports."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.core_build import ROOT, SCRIPT, SOURCES, copy_of_the_build, declared, loaded
from support.waits import LIMIT

from portakv.core.library import ABI, HERE, NAME, check, library, pylibrary
from portakv.core.sources import hash_of, sources_of
from portakv.errors import PortaKVError


@pytest.fixture(scope="module")
def compile_core() -> Any:
    """The module that compiles the core."""
    module = loaded()
    if module.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return module


def build(tree: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command that builds the core of a tree."""
    return subprocess.run(
        [sys.executable, str(tree / SCRIPT), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def small_tree(folder: Path) -> Path:
    """Return a copy of what builds the core, with the few sources that are built soon."""
    tree = copy_of_the_build(folder)
    for source in (tree / "native/core").glob("*.cpp"):
        if source.name not in ("library.cpp", "self_test.cpp"):
            source.unlink()
    return tree


def tool(*words: str) -> str:
    """Return the output of a program of binutils, which come with compilers."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"there is no {words[0]}")
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=LIMIT)
    return done.stdout


# Loading


def test_the_core_of_this_clone_loads_and_passes_its_self_test() -> None:
    core = library()
    assert core.portakv_core_abi() == ABI
    assert core.portakv_core_self_test() == 0
    assert pylibrary().portakv_core_self_test() == 0


def test_both_kinds_of_calls_use_one_library() -> None:
    assert library() is library()
    assert pylibrary() is pylibrary()
    addresses = set()
    for core in (library(), pylibrary()):
        addresses.add(ctypes.cast(core.portakv_core_abi, ctypes.c_void_p).value)
    assert len(addresses) == 1


def test_importing_portakv_loads_no_core() -> None:
    code = "import portakv; assert 'libportakv_core' not in open('/proc/self/maps').read()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)


def test_a_missing_library_names_the_command_that_builds_it(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(PortaKVError, match="got no file") as raised:
        check(path, ROOT)
    assert f"Expected the compiled core at {path}" in str(raised.value)
    assert f"Run `python build_backend/compile_core.py` in {ROOT}" in str(raised.value)


def test_an_installed_release_without_its_library_is_installed_again(tmp_path: Path) -> None:
    with pytest.raises(PortaKVError, match=r"got no file\. Install PortaKV again\.$"):
        check(tmp_path / NAME, tmp_path)


@pytest.mark.parametrize("change", ["changed", "added", "renamed", "removed"])
def test_a_library_of_other_sources_is_rejected(tmp_path: Path, change: str) -> None:
    tree = copy_of_the_build(tmp_path)
    check(HERE / NAME, tree)
    source = tree / "native/core/self_test.cpp"
    if change == "changed":
        source.write_text(source.read_text() + "\n")
    elif change == "added":
        source.with_name("new.h").touch()
    elif change == "renamed":
        source.rename(source.with_name("other.cpp"))
    else:
        source.unlink()
    with pytest.raises(PortaKVError, match="got an older one") as raised:
        check(HERE / NAME, tree)
    assert "Run `python build_backend/compile_core.py`" in str(raised.value)


def test_a_release_has_no_sources_to_compare(tmp_path: Path) -> None:
    check(HERE / NAME, tmp_path)


def test_a_file_that_is_not_a_library_is_rejected(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("not a library")
    with pytest.raises(PortaKVError, match="Expected a compiled core that loads, got: "):
        check(tmp_path / NAME, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expected a compiled core that loads, got: .*portakv_core_abi"),
        (
            "int portakv_core_abi(void) { return 99; }"
            'const char *portakv_core_sources(void) { return ""; }',
            f"Expected version {ABI} of the compiled core's contract, got 99",
        ),
    ],
    ids=["no function", "another version"],
)
def test_a_library_of_another_contract_is_rejected(
    compile_core: Any, tmp_path: Path, text: str, reason: str
) -> None:
    source = tmp_path / "other.cpp"
    source.write_text(f'extern "C" {{ {text} }}')
    command = [*compile_core.compiler(), "-shared", "-fPIC", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / NAME)], check=True, timeout=LIMIT)
    with pytest.raises(PortaKVError, match=reason):
        check(tmp_path / NAME, tmp_path)


# The library's file


def test_it_exports_the_functions_of_the_header_alone(compile_core: Any) -> None:
    listed = tool("nm", "-D", "--defined-only", str(HERE / NAME)).splitlines()
    exported = {line.split()[-1] for line in listed}
    assert exported == declared()
    assert all(name.startswith("portakv_") for name in exported)


def test_it_brings_its_own_runtime_of_cpp() -> None:
    needed = re.findall(r"Shared library: \[(.+)\]", tool("readelf", "-d", str(HERE / NAME)))
    assert [name for name in needed if name.startswith(("libstdc++", "libgcc", "libc++"))] == []
    assert "libc.so.6" in needed


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(compile_core: Any, tmp_path: Path) -> None:
    """Neither the folder nor the number of the process is in the library."""
    contents = []
    for name in ("one", "another folder"):
        tree = copy_of_the_build(tmp_path / name)
        done = build(tree, "--output", str(tmp_path / NAME))
        assert done.returncode == 0, done.stderr
        contents.append((tmp_path / NAME).read_bytes())
        (tmp_path / NAME).unlink()
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]
    assert hash_of(SOURCES).encode() in contents[0]


# Building


def test_the_order_of_the_sources_does_not_depend_on_the_file_system() -> None:
    names = [path.relative_to(SOURCES).as_posix() for path in sources_of(SOURCES)]
    assert names == sorted(names)
    assert {"core.h", "library.cpp", "self_test.cpp"} <= {*names}


def test_a_current_library_is_not_built_again(compile_core: Any, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    made = tree / "src/portakv/core" / NAME
    assert build(tree).stdout == f"built {made}\n"
    first = made.stat()
    assert build(tree).stdout == f"{made} is current\n"
    assert made.stat().st_ino == first.st_ino
    assert build(tree, "--force").stdout == f"built {made}\n"
    assert made.stat().st_ino != first.st_ino
    source = tree / "native/core/self_test.cpp"
    source.write_text(source.read_text() + "\n")
    assert build(tree).stdout == f"built {made}\n"


def test_a_build_that_fails_leaves_the_library_as_it_was(compile_core: Any, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    folder = tree / "src/portakv/core"
    shutil.copy(HERE / NAME, folder)
    (tree / "native/core/broken.cpp").write_text("#error broken on purpose\n")
    done = build(tree)
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {NAME, "sources.py"}
    assert (folder / NAME).read_bytes() == (HERE / NAME).read_bytes()


def test_an_undefined_function_fails_the_build(compile_core: Any, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    text = 'void absent();\nextern "C" PORTAKV_API void portakv_present() { absent(); }\n'
    (tree / "native/core/undefined.cpp").write_text(f'#include "core.h"\n{text}')
    done = build(tree)
    assert done.returncode == 1
    assert "absent" in done.stderr


@pytest.mark.parametrize("status", [1, 127])
def test_a_compiler_that_links_nothing_does_not_count(
    compile_core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """127: the program itself is absent."""
    broken = tmp_path / "broken"
    if status == 1:
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
    before = compile_core.compiler()
    monkeypatch.setenv("CXX", f"{broken} -O2")
    assert compile_core.compiler() in (before, ["c++"], ["g++"], ["clang++"])
    assert not compile_core.links([sys.executable, "-c", "raise SystemExit(1)"])


def test_the_environments_compiler_comes_first(
    compile_core: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program, *_) = compile_core.compiler()
    monkeypatch.setenv("CXX", f"{shutil.which(program)} -O1")
    assert compile_core.compiler() == [shutil.which(program), "-O1"]


def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    tree = copy_of_the_build(tmp_path)
    # -S: without the packages of this environment, which may hold ziglang.
    done = subprocess.run(
        [sys.executable, "-S", str(tree / SCRIPT)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"Expected a C\+\+17 compiler to build PortaKV's core, got none\. Install g\+\+, or run "
        r"`pip install ziglang==[\d.]+`\.\n",
        done.stderr,
    )


def test_an_unknown_architecture_is_rejected(tmp_path: Path) -> None:
    done = build(copy_of_the_build(tmp_path), "--target", "vax")
    assert done.returncode == 1
    assert "Expected a target of x86_64, aarch64, got 'vax'." in done.stderr


def test_a_release_has_the_ziglang_of_every_build() -> None:
    pins = (ROOT / ".ci/tools.txt").read_text(encoding="utf-8").splitlines()
    assert loaded().ZIGLANG in pins
