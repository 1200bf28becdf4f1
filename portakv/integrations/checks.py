# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration of an engine, and the checks that all engines share."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from portakv import Index, KVView, SlotError
from portakv.arguments import size_text
from portakv.errors import PortaKVError
from portakv.integrations import IntegrationError, why_not
from portakv.integrations.interfaces import lacks
from portakv.serving.bucket import bucket_of
from portakv.serving.local import StoreTerms, existing_part
from portakv.storage.tiers.folder import no_space_in

#: The most memory of a container, by cgroups of both versions.
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
#: The types of JSON, as errors name them.
JSON_TYPES: dict[type | None, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    None: "null",
}
#: A check of a bucket tries once.
ONE_TRY = {"retry_config": {"max_retries": 0}}


@dataclass
class Findings:
    """What is wrong with a configuration.

    Attributes:
        errors: the engine would not start, or PortaKV would not be used.
        warnings: the engine starts, and does not do what a user wants.
        notes: what the configuration gives.
        unchecked: what decides whether the engine starts, and was not checked.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @contextmanager
    def catching(self, where: str = "") -> Iterator[None]:
        """Note the error of a refused term, after the key that has it; the rest is left out."""
        try:
            yield
        except PortaKVError as error:
            self.errors.append(f"{where}: {error}" if where else str(error))


def unknown_keys(
    config: Mapping[str, Any], known: Iterable[str], owner: str, *, misspelt: bool = False
) -> Iterator[str]:
    """Yield a sentence for each key that ``owner`` does not have; if ``misspelt``, only for those
    that are like a key that it has."""
    keys = [*known]
    for name in config:
        near = difflib.get_close_matches(name, keys, n=1)
        if name not in keys and (near or not misspelt):
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"Expected a key of {owner}, got {name!r}.{hint} Correct it."


def wrong_values(
    config: Mapping[str, Any],
    expected: Mapping[str, Iterable[Any]],
    *,
    optional: bool = False,
    where: str = "",
) -> Iterator[str]:
    """Yield a sentence for each key that has another value than expected.

    Args:
        expected: for each key values, and types of `JSON_TYPES`.
        optional: keys may be left out.
        where: after the name of a key.
    """
    for name, allowed in expected.items():
        value = config.get(name)
        kind = None if value is None else type(value)
        options = [*allowed]
        good = any(each is kind if each in JSON_TYPES else each == value for each in options)
        if not good and (name in config or not optional):
            one_of = " or ".join(JSON_TYPES.get(each) or repr(each) for each in options)
            yield f"Expected {name}{where} to be {one_of}, got {value!r}. Correct it."


def means_ours(name: object, names: Iterable[str], module: object) -> bool:
    """Return whether a name is one of ``names`` or was meant to be, with a typing error, or its
    module is PortaKV's."""
    text = str(name)
    is_close = difflib.get_close_matches(text, [*names], n=1, cutoff=0.85)
    named = text.lower().startswith("porta") or str(module).startswith("portakv")
    return named or bool(is_close)


def check_release(
    findings: Findings,
    engine: str,
    title: str,
    needs: Iterable[str],
    *,
    who: str,
    install: str = "another release",
) -> bool:
    """Compare the installed release of an engine with what ``who`` needs of it.

    Returns False without a release that could be compared.
    """
    refusal = why_not(engine)
    if refusal:
        findings.warnings.append(refusal)
        return False
    findings.errors += [
        f"The installed {title} has no {name.partition(':')[2]}, which {who} needs. Install "
        f"{install}."
        for name in lacks(needs)
    ]
    return True


def check_places(terms: StoreTerms, findings: Findings, where: str) -> None:
    """Check that this machine has the memory and the space of terms, and that a bucket answers.

    ``where``: the key of the configuration that has the terms, for errors.
    """
    if not terms.attaches:  # the sizes of the store server count
        check_memory(terms.host + terms.staging, findings, "host and staging")
    check_space(terms, findings, where)


def check_space(terms: StoreTerms, findings: Findings, where: str) -> None:
    """Check as `check_places` does, but no memory."""
    with findings.catching(where):
        terms.check_usable()
    findings.warnings += short_of(terms)
    findings.notes += new_folders(terms)
    check_bucket(terms, findings, where)


def check_memory(nbytes: float, findings: Findings, what: str) -> None:
    """Check that this machine, or this container, has so much memory, which an engine takes when
    it starts.

    ``what``: the keys that give it, for the error.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # no such cgroup, or its limit is "max"
            memory = min(memory, int(limit.read_text()))
    if nbytes > memory:
        findings.errors.append(
            f"An engine would take {gib(int(nbytes))} of host memory by {what}, and this machine "
            f"has {gib(memory)}. Give less."
        )


def short_of(terms: StoreTerms) -> Iterator[str]:
    """Yield a sentence for terms without a folder, for a folder that gives files no space, and for
    space that this machine lacks."""
    if not terms.folders and terms.bucket is None:
        yield (
            "There is no folder: blocks are in host memory alone, and end with the engine. Name a "
            "folder to keep them."
        )
    share = terms.capacity // max(1, len(terms.folders))
    for folder in terms.folders:
        existing = existing_part(folder)
        if os.access(existing, os.W_OK | os.X_OK) and (why := no_space_in(Path(existing))):
            yield f"No file in {existing} gets space: {why}. Free some, or pass another folder."
        if terms.attaches:  # the capacity of the store server counts
            continue
        usage = shutil.disk_usage(existing)
        taken = sum([512 * x.stat().st_blocks for x in Path(folder).glob("*") if x.is_file()])
        if share > usage.free + taken:
            yield (
                f"capacity is {gib(share)}, and the file system of {existing} has "
                f"{gib(usage.free)} free, {gib(usage.total)} in all. Give less."
            )


def new_folders(terms: StoreTerms) -> Iterator[str]:
    """Yield a sentence for each folder that an engine will make."""
    for folder in terms.folders:
        existing = existing_part(folder)
        if existing != os.path.abspath(folder):
            yield (
                f"{folder} does not exist: an engine makes it on the file system of {existing}. "
                f"If that is not its disk, mount the disk first."
            )


def check_bucket(terms: StoreTerms, findings: Findings, where: str) -> None:
    """Make the bucket of terms as an engine does, if there is one, and send it one request.

    ``where``: as of `check_places`.
    """
    if terms.bucket is None:
        return
    with findings.catching(where):
        bucket = bucket_of(terms.bucket, {**terms.bucket_options, **ONE_TRY})
        if not bucket.check():
            findings.warnings.append(
                f"The bucket {bucket.url} does not answer here: {bucket.last_error}. An engine "
                f"starts without its blocks, and uses it once it answers. Correct the address, the "
                f"credentials in the environment or bucket_options."
            )


def gib(nbytes: int) -> str:
    """Return a number of bytes as a text."""
    return size_text(nbytes) if nbytes >= 1 << 20 else f"{nbytes} bytes"


# ------------------------------------------------------------------------------------------------
# Check the arguments of functions that replace an engine's own, by their annotations.

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class ArgumentError(IntegrationError, TypeError):
    """An engine's op was called with an argument of another type than its annotation."""


def typed(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return ``function`` with a check of its arguments' types, which raises `ArgumentError`.

    Arguments whose annotation is not in `_CHECKS` are not checked.
    """
    parameters = inspect.signature(function).parameters
    annotations: dict[str, str] = {name: each.annotation for name, each in parameters.items()}
    checks = {name: _check_of(annotation) for name, annotation in annotations.items()}

    @wraps(function)
    def checked(*args: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
        for name, value in chain(zip(checks, args, strict=False), named.items()):
            if name in checks and not checks[name](value):
                raise _wrong_type(function.__name__, name, value, annotations[name])
        return function(*args, **named)

    return checked


def _check_of(annotation: str) -> Callable[[object], bool]:
    """Return a function that checks whether a value is of one of the types of an annotation."""
    checks = [_CHECKS.get(each, _is_anything) for each in annotation.split(" | ")]
    if len(checks) == 1:
        return checks[0]
    return lambda value: any(check(value) for check in checks)


def _wrong_type(function: str, name: str, value: object, annotation: str) -> ArgumentError:
    actual = described(value) if isinstance(value, torch.Tensor) else f"{value!r:.80}"
    if isinstance(value, Sequence) and any(isinstance(x, torch.Tensor) for x in value):
        actual = f"a list of {' and '.join(sorted({type(x).__name__ for x in value}))}"
    return ArgumentError(
        f"{function} got {name} = {actual}, expected {annotation}. Tensors must be strided and "
        f"have memory. Pass such an argument."
    )


def _is_anything(value: object) -> bool:
    return True


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _is_number(value: object) -> bool:
    return isinstance(value, (int, Integral))


#: The check for each annotation.
_CHECKS: dict[str, Callable[[object], bool]] = {
    "torch.Tensor": _is_tensor,
    "int": _is_number,
    "None": lambda value: value is None,
    "list[torch.Tensor]": lambda value: isinstance(value, Sequence) and all(map(_is_tensor, value)),
    "list[int]": lambda value: isinstance(value, Sequence) and all(map(_is_number, value)),
}


def check_ids(index: Index, count: int, view: KVView, written: bool) -> None:
    """Check ids on the host before anything is moved.

    In PortaKV a negative id skips its position. Engines do not use negative ids for that, so they
    are refused here.

    Args:
        index: the ids of one side.
        count: positions of the copy.
        view: the memory that the ids name.
        written: the copy writes this side, so that no id may occur twice.

    Raises:
        SlotError: an id is negative or past the view's end, or occurs twice in a written side.
    """
    side = "destination" if written else "source"
    has_negative = index.check(count, view.slots, side, distinct=written)
    if has_negative:
        raise SlotError(
            f"Expected ids of 0 or more in the {side}, got {index.host_ids().min()} (ids of "
            f"{index.step} token(s)). Nothing was moved. Correct the ids."
        )


def described(tensor: torch.Tensor) -> str:
    """Return the dtype, shape, strides and device of a tensor, for an error."""
    return (
        f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
        f"{tensor.device}"
    )
