# SPDX-License-Identifier: Apache-2.0
"""`portakv conform --contract KIND NAME`: run the contract suite of a tier, a transport or an I/O
engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from portakv.cli.console import print_json
from portakv.errors import PortaKVError
from portakv.migrate import transports
from portakv.migrate.transports.base import Transport
from portakv.selection import Catalog
from portakv.storage import Disk, Remote
from portakv.storage.io.base import Engine
from portakv.storage.io.choose import ENGINES
from portakv.storage.tiers.base import TIERS, Tier
from portakv_conformance.contract import io, tier, transport
from portakv_conformance.contract.runner import Check, Outcome, checks_of, expect, run_checks
from portakv_conformance.run.journal import SubjectUnavailable

#: Makes an implementation.
Maker = Callable[..., Any]
#: The implementations of each contract by name, also those of installed packages.
CATALOGS: dict[str, Catalog[Any]] = {
    "tier": TIERS,
    # With paths, which a process would not take from a peer.
    "transport": Catalog[Transport](
        transports.KIND, Transport, transports.BUILT_IN, "portakv.transports"
    ),
    "io": ENGINES,
}
#: How the contract makes a tier of PortaKV in an empty folder.
_MADE: dict[tuple[str, str], Maker] = {
    ("tier", "disk"): lambda folder: Disk(folder, capacity=8 << 20),
    ("tier", "remote"): lambda folder: Remote(f"file://{folder}"),
}
#: The protocols of subjects that a function may make too, so that a catalog cannot check them.
_PROTOCOLS: dict[str, type] = {"tier": Tier, "io": Engine}


def implementation(contract: str, name: str) -> Maker:
    """Return what makes the subjects of a contract.

    A tier's maker is called with an empty folder, an I/O engine's class without arguments, and a
    transport's class with a device and a timeout in seconds.

    Args:
        name: a built-in name, one of an installed package, or ``package.module:Name``.

    Raises:
        SubjectUnavailable: nothing has that name, it does not load, or it does not make a subject
            of the contract.
    """
    made = _MADE.get((contract, name))
    if made is not None:
        return made
    catalog = CATALOGS[contract]
    try:
        make: Maker = catalog.load(catalog.check("NAME", name))
    except PortaKVError as error:
        raise SubjectUnavailable(str(error)) from error
    except (ImportError, AttributeError) as error:
        raise SubjectUnavailable(
            f"Expected {name!r} to name an object of an installed package, but it does not load: "
            f"{type(error).__name__}: {error}. Correct the name, or install the package."
        ) from error
    if contract in _PROTOCOLS:
        _check_subject(contract, name, make)
    return make


def _check_subject(contract: str, name: str, make: Maker) -> None:
    """Make one subject; raise `SubjectUnavailable` if it lacks a method of its protocol."""
    members = vars(_PROTOCOLS[contract]).items()
    methods = [each for each, member in members if callable(member) and not each.startswith("_")]

    def opened(folder: Path) -> AbstractContextManager[Any]:
        return nullcontext(make(folder) if contract == "tier" else make())

    def check(subject: Any, folder: Path) -> None:
        missing = [each for each in methods if not callable(getattr(subject, each, None))]
        expect(not missing, f"{subject!r} without {', '.join(missing)}")
        if contract == "io":
            subject.close()

    (outcome,) = run_checks([Check("the subject", "", check)], opened)
    if outcome.failure is not None:
        raise SubjectUnavailable(
            f"Expected {contract} {name!r} to make an object with {', '.join(methods)}, got "
            f"{outcome.failure.rstrip('.')}. Name a class or a function that makes such an object."
        )


def outcomes_of(
    contract: str, make: Maker, only: Collection[str] = (), soon: float = transport.SOON
) -> list[Outcome]:
    """Return the outcome of each check of a contract over what ``make`` makes.

    Args:
        only: the names of the checks to run; all if it is empty.
        soon: the seconds in which a transport's slot has to cross or fail.
    """

    def tiers(folder: Path) -> AbstractContextManager[tier.Tiers]:
        return nullcontext(tier.Tiers(make, folder))

    def engine(folder: Path) -> AbstractContextManager[Any]:
        return closing(make())

    def chosen(module: ModuleType) -> list[Check[Any]]:
        checks: list[Check[Any]] = checks_of(module)
        return [each for each in checks if not only or each.name in only]

    if contract == "tier":
        return run_checks(chosen(tier), tiers)
    if contract == "io":
        return run_checks(chosen(io), engine)

    def wire(folder: Path) -> AbstractContextManager[transport.Wire]:
        return transport.wire(make, soon=soon)  # type: ignore[arg-type]

    return run_checks(chosen(transport), wire)


def main(words: Sequence[str]) -> int:
    """Print the outcome of each check; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="portakv conform --contract",
        description="Runs the contract suite of a tier, a transport or an I/O engine.",
    )
    parser.add_argument("contract", choices=CATALOGS, metavar="KIND", help=" or ".join(CATALOGS))
    parser.add_argument("name", metavar="NAME", help="a built-in name, or package.module:Name")
    parser.add_argument("--json", action="store_true", help="print the outcomes as one JSON value")
    args = parser.parse_args(words)
    if "" not in sys.path:
        sys.path.insert(0, "")  # an object of this folder is found, as a run of the suite finds it
    make = implementation(args.contract, args.name)
    try:
        outcomes = outcomes_of(args.contract, make)
    except PortaKVError as error:
        raise SubjectUnavailable(str(error)) from error
    failed = [each for each in outcomes if each.failure is not None]
    if args.json:
        print_json([vars(each) for each in outcomes])
        return int(bool(failed))
    for each in outcomes:
        state = "failed" if each.failure is not None else "kept"
        print(f"{state:<7} {each.name.replace('_', ' ')}")
        if each.failure is not None:
            print(f"        {each.failure}")
    print(f"{args.contract} {args.name}: {len(outcomes)} checks, {len(failed)} failed")
    return int(bool(failed))
