# SPDX-License-Identifier: Apache-2.0
"""Packaging: the declaration against the tree, then the wheel in a clean environment."""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from portakv.integrations import MATRIX

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NATIVE_SUFFIXES = (".cuh", ".cu", ".h", ".hpp", ".cpp", ".md", ".sh")
TEMPLATES = (".css", ".js", ".html", ".md", ".svg", ".xml")
#: Suffixes of the files that travel with Python files, by package.
TRAVELS = {
    "portakv": (".cuh",),
    "portakv_native": NATIVE_SUFFIXES,
    "portakv_benchmarks": (".toml",),
    "portakv_conformance": (".toml", ".c", ".cpp", ".h", *TEMPLATES),
}
PIN = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*( ; python_full_version .+)?")


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return read


@pytest.fixture(scope="module")
def folders(declared: dict[str, Any]) -> dict[str, Path]:
    """Import name -> folder of this repository, for each top-level package."""
    (source,) = declared["tool"]["setuptools"]["package-dir"].values()
    return {link.name: link.resolve() for link in (ROOT / source).iterdir() if link.is_symlink()}


def test_the_demo_asks_for_what_its_plug_serves(declared: dict[str, Any]) -> None:
    served = MATRIX["transformers"]
    wanted = declared["project"]["optional-dependencies"]["demo"]
    assert wanted == [f"transformers>={served.least},<{served.below}"]


def test_each_package_is_declared(declared: dict[str, Any], folders: dict[str, Path]) -> None:
    packaged = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for init in folder.rglob("__init__.py")
    }
    assert packaged == set(declared["tool"]["setuptools"]["packages"])


def test_each_folder_with_python_code_is_a_package(folders: dict[str, Path]) -> None:
    """An example with a ``pyproject.toml`` is a separate project, and stays out of the wheel."""
    modules = [module for folder in folders.values() for module in folder.rglob("*.py")]
    ours = [module for module in modules if not (module.parent / "pyproject.toml").exists()]
    assert [module for module in ours if not (module.parent / "__init__.py").exists()] == []


def test_the_base_install_needs_torch_and_numpy_only(declared: dict[str, Any]) -> None:
    assert declared["project"]["dependencies"] == ["torch>=2.6", "numpy"]


def test_constraints_are_names_and_numbers() -> None:
    """No address, path, hash or local version, so that any index and any build of torch do."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not PIN.fullmatch(line)] == []
    assert "torch==2.13.0" in pins


def test_constraints_hold_what_torch_itself_requires() -> None:
    """torch 2.13.0's CUDA wheel requires triton 3.7.1 and NVRTC 13.0, says its metadata."""
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^triton==3\.7\.1\b", pins, re.MULTILINE)
    assert re.search(r"^nvidia-cuda-nvrtc==13\.0\.\d+$", pins, re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree that holds one native source of each kind."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    left = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left)
    for seeded in seeded_sources():
        (tree / "native" / seeded).parent.mkdir(parents=True, exist_ok=True)
        (tree / "native" / seeded).write_text("// seeded by a test\n")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tree / "dist", tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a new environment that holds the wheel and what it requires."""
    environment = tmp_path_factory.mktemp("clean")
    venv.create(environment, with_pip=True, symlinks=True)
    install: list[str | Path] = ["-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run(environment / "bin/python", *install, wheel)
    return environment / "bin"


def seeded_sources() -> list[str]:
    """Paths under `native/`, one folder deeper than its packages too."""
    return [
        f"{folder}/seeded{suffix}"
        for folder in ("cuda", "ascend", "ascend/emulation")
        for suffix in NATIVE_SUFFIXES
    ] + ["cuda/CMakeLists.txt"]


def run(*command: str | Path, cwd: Path = Path("/")) -> str:
    """Run a command outside the repository; its output joins the failure if there is one."""
    around = {x: y for x, y in os.environ.items() if x not in ("PYTHONPATH", "PORTAKV_BACKEND")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=around,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def metadata(wheel: Path, name: str) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return email.message_from_bytes(archive.read(path))


@pytest.mark.wheel
def test_the_wheel_is_pure_python(wheel: Path) -> None:
    assert metadata(wheel, "WHEEL").get_all("Tag") == ["py3-none-any"]
    assert metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "true"


@pytest.mark.wheel
def test_the_wheel_requires_torch_and_numpy_and_no_more(wheel: Path) -> None:
    fields = metadata(wheel, "METADATA")
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.6", "numpy"]
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License-Expression"] == "Apache-2.0"


@pytest.mark.wheel
def test_the_wheel_holds_every_file_that_travels(wheel: Path, folders: dict[str, Path]) -> None:
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if not (path.parent / "pyproject.toml").exists()  # an example that is a separate project
        if path.suffix in (".py", ".typed", *TRAVELS.get(name, ())) or path.name == "CMakeLists.txt"
    }
    expected |= {f"portakv_native/{seeded}" for seeded in seeded_sources()}
    expected.add("portakv_command.py")  # the script `portakv`, which stands apart from the package
    with zipfile.ZipFile(wheel) as archive:
        actual = {path for path in archive.namelist() if ".dist-info/" not in path}
    assert actual == expected


@pytest.mark.wheel
@pytest.mark.parametrize(
    "module",
    ["portakv", "portakv_native.cuda", "portakv_native.ascend", "portakv_conformance.judge.oracle"],
)
def test_the_installed_wheel_imports(clean: Path, module: str) -> None:
    """It imports from the environment's own folder, without the repository on the path."""
    where = run(clean / "python", "-I", "-c", f"import {module} as it; print(it.__file__)")
    assert Path(where.strip()).is_relative_to(clean.parent)


@pytest.mark.wheel
def test_the_command_runs_without_any_extra(clean: Path) -> None:
    """A plain table where rich is missing."""
    assert "reference" in run(clean / "portakv", "backends")
