# SPDX-License-Identifier: Apache-2.0
"""Options of `portakv doctor` that say what is wrong with a configuration of an engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from portakv.arguments import kind_of
from portakv.cli.console import print_json, print_prose
from portakv.errors import InvalidTerms
from portakv.integrations import lmcache_check
from portakv.integrations.findings import Findings
from portakv.integrations.sglang_check import hicache_findings_of
from portakv.integrations.vllm_connectors_check import connector_findings_of
from portakv.serving.sizing import Sizes, sizes_of

Find: TypeAlias = Callable[[Mapping[str, Any], "Sizes | None", int | None], Findings]


class Check(NamedTuple):
    """What an option checks.

    Attributes:
        engine: whose configuration it is.
        find: returns what is wrong with it, for a model of known sizes.
    """

    engine: str
    find: Find


CHECKS = {
    "--kv-transfer-config": Check("vLLM", connector_findings_of),
    "--l2-adapter": Check("LMCache's server", lambda config, *_: lmcache_check.findings_of(config)),
    "--hicache-config": Check("SGLang", lambda config, *_: hicache_findings_of(config)),
}


def check_config(
    option: str, config: str, model: str | None, as_json: bool, block_size: int | None = None
) -> int:
    """Print what is wrong with a configuration; return 1 if it has an error.

    With warnings alone return 0, since a configuration may be for another machine. The last line
    then does not say that the engine starts, and neither does it if something was not checked.

    Args:
        option: one of `CHECKS`.
        config: JSON, or the path of a file with it, after an @ or without.
        model: a folder with the ``config.json`` of a model; None: not known.
        as_json: print one JSON value.
        block_size: of vLLM's ``--block-size``; None: vLLM chooses it.

    Raises `InvalidTerms` for texts that are not JSON objects.
    """
    engine, find = CHECKS[option]
    sizes = None if model is None else _sizes(model)
    findings = find(_object(option, config.removeprefix("@")), sizes, block_size)
    code = 1 if findings.errors else 0
    if as_json:
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
    print(_answer(engine, findings))
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
    """Return the sizes of a model in a folder."""
    path = Path(model, "config.json")
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
