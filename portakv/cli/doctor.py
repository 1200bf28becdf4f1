# SPDX-License-Identifier: Apache-2.0
"""`portakv doctor`: print which integrations, devices and extras work here, and why others do not.

Engines are looked up by their package metadata; no engine is imported. Its options print what is
wrong with a configuration of an engine instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from portakv.arguments import kind_of, whole
from portakv.cli.backends import candidates_for, print_versions, versions
from portakv.cli.console import Report, installing, print_json, print_prose, print_rows
from portakv.cli.store import check_installed
from portakv.errors import InvalidTerms
from portakv.integrations import (
    INTEGRATIONS,
    MATRIX,
    Integration,
    installed,
    is_here,
    untested,
    why_not,
)
from portakv.registry import ENVIRONMENT
from portakv.runtime import kernel_cache
from portakv.runtime.devices import device_name, devices_present
from portakv.selection import Catalog, Kind
from portakv.storage.io.choose import ENGINES

if TYPE_CHECKING:
    from portakv.integrations.checks import Findings
    from portakv.serving.sizing import Sizes

HELP = "list the integrations, devices and extras that work here, and why others do not"
DESCRIPTION = """\
Prints for each integration whether a supported release of its engine is
installed, which devices of this machine it serves there, and the line of
configuration that chooses it; then the backend of each device, and the extras
that are missing. No engine is imported."""

#: Python 3.14 has zstd, and older releases get the same by a package.
_ZSTD: tuple[str, ...] = () if sys.version_info >= (3, 14) else ("backports.zstd",)
#: The modules that an extra brings, and their purpose.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "cli": (("rich",), "the progress of long commands"),
    "demo": (("transformers",), "the model of `portakv demo`"),
    "integrations": (("packaging",), "the check of an engine's release"),
    "conformance": (("pytest", "hypothesis", "jinja2"), "`portakv conform`"),
    "bench": (("rich", "matplotlib"), "the tables and plots of `portakv bench`"),
    "cuda": (("cuda.bindings",), "the backend `cuda` and copies by the driver, on NVIDIA's GPUs"),
    "storage": ((), "block stores on the host and on disks"),
    "remote": (("obstore",), "block stores in S3, GCS, Azure and the like"),
    "zstd": (_ZSTD, "compressed blocks in S3, GCS, Azure and the like"),
    "migrate": (("msgspec", "zmq"), "rows and weights of other processes"),
    "serving": (("obstore", "msgspec", "zmq"), "one store for the engines of a host"),
    "nixl": (("nixl",), "rows of other hosts over UCX: RDMA, sockets"),
    "mooncake": (("mooncake",), "the same over Mooncake, on CUDA 13"),
    "metrics": (("prometheus_client",), "the counters of block stores for Prometheus"),
    "otel": (("opentelemetry",), "metrics and spans for OpenTelemetry"),
    "triton": (("triton",), "the backends `triton` and `compiled` on GPUs"),
}

#: The implementations that variables choose from. Transports need extras, and are not imported
#: here.
CHOICES: dict[str, Catalog[Any]] = {
    "PORTAKV_MOVER": Catalog(
        Kind("transport", unknown=InvalidTerms),
        None,
        dict.fromkeys(("distributed", "nixl", "mooncake"), ""),
        "portakv.transports",
        paths=False,
    ),
    "PORTAKV_IO": ENGINES,
}


#: The options that check a configuration of an engine instead: the engine, and what is checked.
CONFIGURATIONS = {
    "--kv-transfer-config": ("vLLM", "vLLM's configuration of this name"),
    "--l2-adapter": ("LMCache's server", "LMCache's configuration of this name"),
    "--hicache-config": ("SGLang", "SGLang's --hicache-storage-backend-extra-config"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that check a configuration of an engine instead."""
    for option, (_, what) in CONFIGURATIONS.items():
        about = f"check {what}, and nothing else: a text or a file"
        parser.add_argument(option, metavar="JSON", help=about)
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model that vLLM's configuration is for: its folder, or the config.json in it",
    )
    parser.add_argument(
        "--block-size",
        metavar="TOKENS",
        type=int,
        help="vLLM's option of this name, if the engine is started with it",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, and return 0: it can be made on every machine.

    Return 1 for a configuration with which an engine would not start, or not use PortaKV.
    """
    texts = {option: getattr(args, option[2:].replace("-", "_")) for option in CONFIGURATIONS}
    option = next((option for option, text in texts.items() if text is not None), None)
    for name, value in (("--model", args.model), ("--block-size", args.block_size)):
        if value is not None and option != "--kv-transfer-config":
            raise InvalidTerms(
                f"Expected --kv-transfer-config next to {name}, got none. Pass the configuration."
            )
    if args.block_size is not None:
        whole("--block-size", args.block_size, 1, what="of tokens")
    if option is not None:
        check_installed(f"portakv doctor {option}")
        return _check_config(option, texts[option], args)
    devices = [_device(device) for device in devices_present()]
    served = [one["type"] for one in devices if one["backend"]]
    report: Report = {
        **versions(),
        "variables": [*_wrong_variables()],
        "plugs": [_integration(name, served) for name in INTEGRATIONS],
        "devices": devices,
        "extras": [one for one in map(_extra, EXTRAS) if one["missing"]],
    }
    (print_json if args.json else _print)(report)
    return 0


def _wrong_variables() -> Iterator[str]:
    """Yield a sentence for each variable of PortaKV whose value cannot be used."""
    for name, choices in CHOICES.items():
        value = os.environ.get(name)
        if not value:
            continue
        try:
            choices.check(name, value)
        except InvalidTerms as error:
            yield str(error)
            continue
        missing = _extra(value)["missing"] if value in EXTRAS else []
        if missing:
            yield (
                f"Expected {name} to name a module that runs here, got {value!r}: "
                f"{', '.join(missing)} is not installed. {installing(value)} brings it."
            )
    refusal = kernel_cache.refusal()
    if refusal:
        yield (
            f"Expected {kernel_cache.ENVIRONMENT} to be a private folder that you can write to: "
            f"{refusal}. Set it to such a folder; until then each process compiles its kernels."
        )


def _integration(name: str, served: Sequence[str]) -> Report:
    """Return the report of an integration; ``served`` has the types of devices with a backend."""
    integration = INTEGRATIONS[name]
    releases = MATRIX[name]
    kinds = [kind for kind in served if kind in (integration.devices or served)]
    requested = _requested(integration)

    # The accelerator is the last device of a machine.
    matching = [kind for kind in kinds if integration.at(kind) == requested]
    kind = matching[0] if matching else (kinds or ["cpu"])[-1]

    missing = why_not(name)
    reasons = [missing] if missing else list(_obstacles(integration, kind, requested))
    if not kinds:
        backend = os.environ.get("PORTAKV_BACKEND")
        forced = f" with PORTAKV_BACKEND={backend!r}" if backend else ""
        reasons.append(
            f"The integration {name!r} needs a device with a backend, and no device of this "
            f"machine has one{forced}. Run `portakv backends`, which prints why."
        )
    answer = "chosen" if requested else "on request"
    notes = [
        f"It serves {', '.join(integration.devices)}, and not {other}."
        for other in served
        if other not in kinds
    ]
    package = installed(releases.package)
    found = None
    if package is not None:  # a distribution may have another name than the module
        name_of, version = package
        found = version if name_of == releases.package else f"{name_of} {version}"
    extra = integration.extra
    if extra and _extra(extra)["missing"]:
        notes.append(f"The line needs the extra {extra}: {installing(extra)} brings it.")
    return {
        "plug": name,
        "found": found,
        "serves": str(releases),
        "devices": kinds,
        "answer": "rejected" if reasons else answer,
        "line": integration.line.replace("{device}", kind),
        "reasons": reasons,
        "notes": [*notes, *filter(None, [untested(name)])],
    }


def _requested(integration: Integration) -> str:
    """Return the value of the variable that chooses an integration; empty if it is unset or 0."""
    value = os.environ.get(integration.variable, "").strip().lower()
    return "" if value == "0" else value


def _obstacles(integration: Integration, kind: str, requested: str) -> Iterator[str]:
    """Yield each reason why an installed engine would not load an integration for a device type."""
    group = integration.group
    if not group:
        return
    entry = integration.at(kind)
    entry_points = metadata.entry_points(group=group, name=entry)
    foreign = [each for each in entry_points if not each.value.startswith("portakv.")]
    if len(entry_points) == len(foreign):
        yield (
            f"The engine loads PortaKV by the entry point {entry} of {group}, which is missing. "
            f"Install PortaKV again: a folder on PYTHONPATH has no entry points."
        )
    for each in foreign:
        package = each.dist.name if each.dist else "another package"
        yield (
            f"Expected the entry point {entry} of {group} from PortaKV alone, but {package} has it "
            f"for {each.value} as well. Uninstall {package}."
        )
    allowed = os.environ.get(integration.allows, "")
    if allowed and entry not in map(str.strip, allowed.split(",")):
        yield (
            f"{integration.allows}={allowed} is set, so that the engine loads no other plugins. "
            f"Unset it, or add {entry}."
        )
    if requested and integration.devices and requested != entry:
        yield (
            f"{integration.variable}={requested} is set, and no device here is served by that "
            f"name; expected {entry}. Set that, or unset it."
        )


def _device(device: torch.device) -> Report:
    """Return the backend that would be chosen for a device, and the registry's reason."""
    taken = next((one for one in candidates_for(device) if one["chosen"]), None)
    why = "no backend is chosen; `portakv backends` prints every answer"
    return {
        "device": str(device),
        "type": device.type,
        "name": device_name(device),
        "backend": taken["name"] if taken else None,
        "reason": taken["reason"] if taken else why,
    }


def _extra(extra: str) -> Report:
    """Return the modules of an extra that are not installed."""
    modules, gives = EXTRAS[extra]
    missing = [module for module in modules if not is_here(module)]
    return {"extra": extra, "missing": missing, "gives": gives}


def _print(report: Report) -> None:
    print_versions(report)
    if report["forced"]:
        print(f"{ENVIRONMENT}={report['forced']} is set: no other backend is chosen.")
    for sentence in report["variables"]:
        print_prose(sentence)
    print()
    _table(report["plugs"], "plug", "found", "serves", "devices", "answer")
    for one in report["plugs"]:
        print()
        if one["answer"] != "rejected":
            print(f"{one['plug']}: {one['line']}")  # on one line, so that a user can copy it
        for sentence in (*one["reasons"], *one["notes"]):
            print_prose(f"{one['plug']}: {sentence}")
    print()
    _table(report["devices"], "device", "name", "backend", "reason")
    print()
    if not report["extras"]:
        print("No extra is missing.")
        return
    _table(report["extras"], "extra", "missing", "gives")
    print()
    extras = ",".join(one["extra"] for one in report["extras"])
    print_prose(f"{installing(extras)} brings them.")


#: Titles of columns whose JSON key is another word.
_TITLES = {"plug": "integration", "found": "installed"}


def _table(reports: Sequence[Report], *keys: str) -> None:
    rows = [[_text(report[key]) for key in keys] for report in reports]
    print_rows([_TITLES.get(key, key) for key in keys], rows, prose=("reason", "gives"))


def _text(value: str | Sequence[str] | None) -> str:
    """Return the text of a cell: ``-`` for an empty value."""
    return (value if isinstance(value, str) else ", ".join(value or [])) or "-"


def _check_config(option: str, text: str, args: argparse.Namespace) -> int:
    """Print what is wrong with a configuration; return 1 if it has an error.

    With warnings alone return 0, since a configuration may be for another machine. The last line
    then does not say that the engine starts, and neither does it if something was not checked.

    Args:
        option: one of `CONFIGURATIONS`.
        text: JSON, or the path of a file with it, after an @ or without.

    Raises `InvalidTerms` for texts that are not JSON objects.
    """
    sizes = None if args.model is None else _sizes(args.model)
    config = _object(option, text.removeprefix("@"))
    # Imported here: they need the extra `serving`, and no other report does.
    if option == "--kv-transfer-config":
        from portakv.integrations.vllm.check import connector_findings_of

        findings = connector_findings_of(config, sizes, args.block_size)
    elif option == "--l2-adapter":
        from portakv.integrations.lmcache.check import findings_of

        findings = findings_of(config)
    else:
        from portakv.integrations.sglang.check import hicache_findings_of

        findings = hicache_findings_of(config)
    code = 1 if findings.errors else 0
    if args.json:
        print_json(vars(findings))
        return code
    for kind, sentences in (
        ("error", findings.errors),
        ("warning", findings.warnings),
        ("note", findings.notes),
        ("not checked", findings.unchecked),
    ):
        for sentence in sentences:
            print_prose(f"{kind}: {sentence}")
    print(_answer(CONFIGURATIONS[option][0], findings))
    return code


def _answer(engine: str, findings: Findings) -> str:
    """Return the last line: whether the engine starts, as far as this machine shows it."""
    if findings.errors:
        return f"{engine} would not start with this configuration, or not use PortaKV."
    if findings.warnings:
        return "No error was found in this configuration. See the warnings above."
    if findings.unchecked:
        return "No error was found in this configuration. See above what was not checked."
    return f"{engine} starts with this configuration, and uses PortaKV."


def _sizes(model: str) -> Sizes:
    """Return the sizes of a model, from its folder or from the ``config.json`` in it."""
    path = Path(model)
    if path.name != "config.json":
        path /= "config.json"
    if not path.is_file():
        raise InvalidTerms(
            f"Expected --model to be a folder with a config.json, got {model!r}. Pass the folder "
            f"of a downloaded model."
        )
    config = _object("--model", str(path))
    quantized = path.with_name("hf_quant_config.json")
    if not config.get("quantization_config") and quantized.is_file():  # as vLLM reads it
        of_weights = _object("--model", str(quantized))
        config["quantization_config"] = {"quant_method": "modelopt", **of_weights}
    from portakv.serving.sizing import sizes_of

    return sizes_of(config)


def _object(option: str, text: str) -> dict[str, Any]:
    """Return a JSON object, from a text or from the file that the text names."""
    is_file = os.path.isfile(text)
    if is_file:
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidTerms(
                f"Expected {option} to be a file of JSON that can be read, got {text!r}: {error}. "
                f"Correct it."
            ) from None
    try:
        made = json.loads(text)
    except ValueError as error:
        if is_file or text.lstrip().startswith(("{", "[")):
            raise InvalidTerms(
                f"Expected {option} to be JSON, got an error: {error}. Correct it."
            ) from None
        raise InvalidTerms(
            f"Expected {option} to be JSON or the path of a file, got {text!r}, which is neither. "
            f"Correct it."
        ) from None
    if not isinstance(made, dict):
        raise InvalidTerms(
            f"Expected {option} to be a JSON object, got {kind_of(made)}. Correct it."
        )
    return made
