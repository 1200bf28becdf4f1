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
from portakv.storage.io.choose import ENGINES
from portakv.storage.tier import TIERS
from portakv_conformance.contract import io, tier, transport
from portakv_conformance.contract.runner import Check, Outcome, checks_of, run_checks
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


def implementation(contract: str, name: str) -> Maker:
    """Return what makes the subjects of a contract.

    A tier's maker is called with an empty folder, an I/O engine's class without arguments, and a
    transport's class with a device and a timeout in seconds.

    Args:
        name: a built-in name, one of an installed package, or ``package.module:Name``.

    Raises:
        SubjectUnavailable: nothing has that name, or it does not load.
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
    return make


def outcomes_of(contract: str, make: Maker, only: Collection[str] = ()) -> list[Outcome]:
    """Return the outcome of each check of a contract over what ``make`` makes; ``only`` names the
    checks to run, all if it is empty."""

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
    return run_checks(chosen(transport), lambda folder: transport.wire(make))  # type: ignore[arg-type]


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
