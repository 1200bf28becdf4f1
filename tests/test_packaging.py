# SPDX-License-Identifier: Apache-2.0
"""Packaging: the declaration against the tree, then the wheel in a clean environment."""

from __future__ import annotations

import email
import email.message
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.waits import LIMIT

from portakv.cli import VERBS
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
    "portakv": (".cuh", ".toml"),
    "portakv_native": NATIVE_SUFFIXES,
    "portakv_conformance": (".toml", ".c", ".cpp", ".h", *TEMPLATES),
}
#: What an installation compiles. Its sources are in the source distribution, and in no wheel.
CORE = ROOT / "native" / "core"
CORE_LIBRARY = "portakv/core/libportakv_core.so"
#: Packages of a clone alone.
STAYS = {"portakv_benchmarks", "portakv_examples"}
#: The verbs of the command from the base package, and a verb that an extra serves: the exit code,
#: and words of what is printed.
BASE_VERBS = [
    ("doctor", 0, "torch"),
    ("doctor --kv-transfer-config {{}}", 1, "portakv[serving]"),
    ("backends", 0, "reference"),
    ("explain vllm-nhd flexkv-blockfirst", 0, "block"),
    ("explain --host --device cpu", 0, "overlap"),
    ("explain --hooks localhost", 1, "portakv[serving]"),
    ("layouts vllm-nhd", 0, "vllm-nhd"),
    ("store show {folder}", 1, "Pass a folder of a `Disk` tier"),
    ("store serve {folder}", 1, "portakv[serving]"),
    ("witness show {folder}", 2, "Expected FILE to be a file that a witness wrote"),
    ("top {folder}", 1, "portakv[serving]"),
    ("explain --peer", 1, "portakv[migrate]"),
    ("warmup --arch 90", 1, "cuda-bindings"),
    ("calibrate --device cpu", 1, "Expected an accelerator"),
    ("demo --device cpu", 0, "all right through reference"),
    ("conform reference", 2, "portakv[conformance]"),
    ("bench", 1, "portakv: `portakv bench` needs a clone of PortaKV"),
]
#: One case of the suite, and one fault of the table: each verb runs, and the test stays short.
CASE = "'cases/test_core.py::test_rows_move[gather-int32-1]'"
FAULT = "'two blocks swapped, open'"
#: Likewise, with the packages that the extras bring, in lists whose lines depend on each other. A
#: server runs until the last line of its list has ended, and ends with its code at SIGTERM. {page}
#: is the address of an engine's metrics.
EXTRA_VERBS = [
    [("demo --device cpu", 0, "logits    bit-identical")],
    [
        (f"conform --tier disk --only {FAULT} --report {{folder}}/tier.json", 0, "1 miss"),
        ("conform --tier --replay {folder}/tier.json", 0, "replayed part, 1 of"),
    ],
    [
        ("store serve {folder}/served --host 16777216 --staging 4194304", 0, "This process serves"),
        ("top {folder}/served --count 1 --seconds 0.05", 0, "/served: "),
    ],
    [("explain --peer --device cpu", 0, "CURVE")],
    [(f"conform reference --device cpu --profile core --only {CASE}", 0, ": 1 passed")],
    [("conform --contract tier disk", 0, "")],
    [("warmup --arch 90 --shape encoder-cache", 0, "Compiled")],
    [("doctor --kv-transfer-config '{{}}'", 1, "vLLM would not start")],
    [("explain --hooks {page}", 0, "build_connector_meta")],
    [("bench", 1, "portakv: `portakv bench` needs a clone of PortaKV")],
]
PIN = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*( ; python_full_version .+)?")


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return read


@pytest.fixture(scope="module")
def folders(declared: dict[str, Any]) -> dict[str, Path]:
    """Import name -> folder of this repository, for each package of a release."""
    (source,) = declared["tool"]["setuptools"]["package-dir"].values()
    links = [link for link in (ROOT / source).iterdir() if link.is_symlink()]
    assert {link.name for link in links} > STAYS
    return {link.name: link.resolve() for link in links if link.name not in STAYS}


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
    # By way of the source distribution, as a release is made. A library of this clone stays behind.
    (tree / CORE_LIBRARY).write_text("a library that an editable installation left")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree)
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


def run(*command: str | Path, cwd: Path = Path("/"), path: str = "", code: int = 0) -> str:
    """Run a command outside the repository, and return what it prints.

    Its output joins the failure if the exit code is another than ``code``. ``path`` becomes
    PYTHONPATH.
    """
    around = without_clone()
    if path:
        around["PYTHONPATH"] = path
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=around,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def without_clone() -> dict[str, str]:
    """Return the environment without what leads to the clone or forces a backend."""
    return {x: y for x, y in os.environ.items() if x not in ("PYTHONPATH", "PORTAKV_BACKEND")}


def metadata(wheel: Path, name: str) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return email.message_from_bytes(archive.read(path))


@pytest.mark.wheel
def test_the_wheel_serves_every_python_on_this_platform(wheel: Path) -> None:
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert metadata(wheel, "WHEEL").get_all("Tag") == [f"py3-none-{platform}"]
    assert metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "false"
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@pytest.mark.wheel
def test_the_source_distribution_holds_what_compiles_the_core(wheel: Path) -> None:
    """And no compiled library: each machine makes its own."""
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        files = [each.name for each in packed.getmembers() if each.isfile()]
    held = {name.partition("/")[2] for name in files}
    sources = {x.relative_to(ROOT).as_posix() for x in (ROOT / "native/core").rglob("*.*")}
    backend = {x.relative_to(ROOT).as_posix() for x in (ROOT / "build_backend").glob("*.py")}
    assert sources | backend <= held
    assert [name for name in held if name.endswith(".so")] == []


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
        if not path.is_relative_to(CORE) or path.stem == "rows"
        if path.suffix in (".py", ".typed", *TRAVELS.get(name, ())) or path.name == "CMakeLists.txt"
    }
    expected |= {f"portakv_native/{seeded}" for seeded in seeded_sources()}
    expected.add(CORE_LIBRARY)
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
def test_the_installed_core_loads(clean: Path) -> None:
    code = (
        "from portakv.core.library import library as core; print(core().portakv_core_self_test())"
    )
    assert run(clean / "python", "-I", "-c", code) == "0\n"


@pytest.mark.wheel
@pytest.mark.parametrize("package", sorted(STAYS))
def test_the_installed_wheel_lacks_what_stays(clean: Path, package: str) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}))"
    assert run(clean / "python", "-I", "-c", code).strip() == "None"


@pytest.mark.wheel
@pytest.mark.parametrize(("line", "code", "words"), BASE_VERBS, ids=[x for x, *_ in BASE_VERBS])
def test_each_verb_without_any_extra(
    clean: Path, tmp_path: Path, line: str, code: int, words: str
) -> None:
    """It works, or says in one sentence which extra or device it needs."""
    output = run(clean / "portakv", *line.format(folder=tmp_path).split(), code=code)
    assert words in output
    assert "Traceback" not in output
    errors = [each for each in output.splitlines() if each.startswith("portakv: ")]
    assert len(errors) == (1 if code else 0), output


@pytest.mark.wheel
def test_each_verb_with_its_extra(clean: Path, tmp_path: Path) -> None:
    """The extras' packages are those of this environment; PortaKV is the wheel's.

    Two lists of lines run together, since each command imports torch for most of its time.
    """
    packages = sysconfig.get_path("purelib")  # without its .pth files, and so without the clone
    where = "import portakv; print(portakv.__file__)"
    found = run(clean / "python", "-c", where, path=packages).strip()
    assert Path(found).is_relative_to(clean.parent)
    # NVRTC's loader searches the environment of the interpreter, which is the wheel's.
    libraries = ":".join(map(str, Path(packages, "nvidia").glob("*/lib")))
    start = ["env", f"LD_LIBRARY_PATH={libraries}", str(clean / "portakv")]
    (tmp_path / "served").mkdir(mode=0o700)

    def run_lines(lines: list[tuple[str, int, str]]) -> None:
        with ExitStack() as stack:
            for line, code, words in lines:
                command = [*start, *shlex.split(line.format(folder=tmp_path, page=page))]
                if line.startswith("store serve "):
                    stack.enter_context(server(command, packages, code, words))
                    continue
                output = run(*command, path=packages, code=code)
                assert " ".join(words.split()) in " ".join(output.split()), line

    with metrics_page(tmp_path / "page") as page, ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(run_lines, lines) for lines in EXTRA_VERBS]:
            ended.result()


@contextmanager
def server(command: list[str], path: str, code: int, words: str) -> Iterator[None]:
    """Run a command that serves, from the line that has its words until SIGTERM ends it."""
    around = {**without_clone(), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    output = subprocess.PIPE
    with subprocess.Popen(command, cwd="/", env=around, stdout=output, text=True) as process:
        assert process.stdout is not None
        try:
            assert words in process.stdout.readline()
            yield
        finally:
            process.terminate()
        assert process.wait(LIMIT) == code


@contextmanager
def metrics_page(folder: Path) -> Iterator[str]:
    """Serve the metrics of an engine whose connector ran a step; yield the address."""
    folder.mkdir()
    side = 'engine="0",side="scheduler"'
    lines = [
        f"vllm:portakv_steps_total{{{side}}} 1.0",
        f'vllm:portakv_hook_seconds_total{{{side},hook="build_connector_meta"}} 0.001',
    ]
    (folder / "metrics").write_text("\n".join(lines) + "\n")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def name_of(line: str) -> str:
    """Return the verb of a line, and its action or first option."""
    return " ".join(word for word in line.split()[:2] if not word.startswith("{"))


def test_each_verb_that_needs_an_extra_runs_with_it() -> None:
    refusals = ("portakv[", "cuda-bindings")
    refused = {name_of(line) for line, _, words in BASE_VERBS if words.startswith(refusals)}
    assert len(refused) > 5
    run_with_extras = {name_of(line) for lines in EXTRA_VERBS for line, *_ in lines}
    assert refused - run_with_extras == set()


def test_the_lines_name_every_verb() -> None:
    assert {line.split()[0] for line, *_ in BASE_VERBS} == set(VERBS)
