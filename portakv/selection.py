# SPDX-License-Identifier: Apache-2.0
"""Select one of several implementations by name, and record why the others were not taken.

Backends, strategies between devices, transports and I/O engines are all selected here. A `Catalog`
holds the candidates of one kind: built-in ones, those of installed packages (entry points),
registered ones, and classes named as ``pkg.mod:Class``. `select` tries candidates in order, takes
the first one that accepts, and returns every decision. An environment variable or else an argument
forces one candidate: then no other is tried, and the caller gets an error if that one rejects.
"""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from inspect import isabstract
from typing import Any, Generic, NamedTuple, TypeVar, cast

from portakv.arguments import shown
from portakv.errors import BackendUnavailable, PortaKVError

Made = TypeVar("Made")
Base = TypeVar("Base")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about a candidate, and the reason, as a sentence."""

    name: str
    accepted: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'accepted' if self.accepted else 'rejected'}, {self.reason}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of implementation that users can choose.

    Attributes:
        noun: its name in messages.
        variable: the environment variable that forces a candidate. Empty: none does.
        argument: the argument that forces a candidate. Empty: none does.
        error: makes the error of a message: a forced candidate rejects, or no candidate accepts.
        unknown: raised for a name that no candidate has.
        listing: the command that lists each candidate's decision, with ``{target}`` for what is
            to be served. Empty: there is none.
    """

    noun: str
    variable: str = ""
    argument: str = ""
    error: Callable[[str], PortaKVError] = BackendUnavailable
    unknown: type[PortaKVError] = BackendUnavailable
    listing: str = ""

    @property
    def one(self) -> str:
        """The noun with its indefinite article."""
        return f"{'an' if self.noun[0] in 'aeioAEIO' else 'a'} {self.noun}"

    def forced(self, name: str | None = None) -> str | None:
        """Return the name that the variable forces, else ``name``; None: PortaKV chooses."""
        return (os.environ.get(self.variable) if self.variable else None) or name

    def source(self) -> str:
        """Return the name of the variable, if it forces a candidate, else of the argument."""
        forces = self.variable and os.environ.get(self.variable)
        return self.variable if forces else self.argument

    def release(self) -> str:
        """Return what a user does so that no candidate is forced, as a phrase."""
        if self.variable and os.environ.get(self.variable):
            return f"Unset {self.variable}"
        return f"Pass {self.argument}=None" if self.argument else f"Name no {self.noun}"


@dataclass(frozen=True, slots=True)
class Selected(Generic[Made]):
    """The implementation that was taken, and each decision until then, the last one accepted."""

    value: Made
    trace: tuple[Decision, ...]

    @property
    def name(self) -> str:
        """The name of the candidate that was taken."""
        return self.trace[-1].name

    @property
    def why(self) -> str:
        """Every decision, as one line."""
        return "; ".join(map(str, self.trace))


def select(
    kind: Kind,
    target: object,
    names: Iterable[str],
    consider: Callable[[str], tuple[Made | None, Decision]],
    forced: str | None = None,
) -> Selected[Made]:
    """Return the first candidate that accepts.

    Args:
        target: what the candidate is to serve, such as a device; for messages.
        names: the candidates in order.
        consider: makes a candidate and returns it with the decision; None if it rejects.
        forced: the only candidate to consider. None: all of ``names``.

    Raises:
        PortaKVError: ``kind.error``, if the forced candidate rejects, or no candidate accepts. Its
            ``trace`` holds the decisions.
    """
    decisions: list[Decision] = []
    for name in names if forced is None else (forced,):
        made, decision = consider(name)
        decisions.append(decision)
        if made is not None:
            return Selected(made, tuple(decisions))
    raise unavailable(kind, target, decisions, forced)


def unavailable(
    kind: Kind,
    target: object,
    decisions: Sequence[Decision],
    forced: str | None = None,
    better: str | None = None,
) -> PortaKVError:
    """Return the error if the forced candidate, or every candidate, rejected ``target``.

    ``better``: a candidate that accepts it, if one is known.
    """
    if forced is not None:
        summary = (
            f"Expected {kind.noun} {forced!r}, which is forced, to serve {target}, but it cannot: "
            f"{decisions[-1].reason}."
        )
        known = "" if better is None else f" {kind.argument}={better!r}"
        todo = f"{kind.release()} to let PortaKV choose{known}, or fix the cause."
    else:
        lines = [f"Expected {kind.one} to serve {target}, but none can:"]
        summary = "\n".join([*lines, *(f"  {decision}" for decision in decisions)])
        todo = "Fix one of the causes."
    if kind.listing:
        todo += f" `{kind.listing.format(target=target)}` lists every candidate's decision."
    error = kind.error(f"{summary}\n{todo}")
    error.trace = tuple(decisions)
    return error


class _Found(NamedTuple):
    """What a catalog has read: its own candidates, and the entry points of other packages."""

    targets: dict[str, Any]
    installed: set[str]  # the names of those entry points
    refused: list[Decision]


class Catalog(Generic[Base]):
    """The candidates of one kind by name, each a class or the text ``"package.module:Class"``.

    A class is imported when it is loaded. An entry point never replaces a candidate of the same
    name.

    Args:
        kind: what the candidates are.
        base: the class that each candidate extends. None: a candidate is anything that makes one.
        built_in: the candidates of PortaKV, in the order in which they are tried.
        group: the entry-point group of other packages' candidates.
        last: built-in candidates that are tried after those of other packages.
        paths: False takes names alone, not ``"package.module:Class"``. A name that comes from
            another process must not import anything.
    """

    def __init__(
        self,
        kind: Kind,
        base: type[object] | None,
        built_in: Mapping[str, str | type[Base]],
        group: str,
        last: Sequence[str] = (),
        paths: bool = True,
    ) -> None:
        self.kind = kind
        self.built_in = built_in
        self._base = base
        self._group = group
        self._last = last
        self._paths = paths
        self._read_once = dict[str, _Found]()

    def _found(self) -> _Found:
        """Return the candidates. Entry points are read on first use."""
        # What the first reader stores stays: `register` may have added to it.
        known = self._read_once.get(self._group)
        return known or self._read_once.setdefault(self._group, self._read())

    def _read(self) -> _Found:
        found = _Found(dict(self.built_in), set(), [])
        for entry in entry_points(group=self._group):
            if entry.name in found.targets:
                one = self.kind.one
                why = f"the entry point {entry.value!r} would replace {one} of that name"
                found.refused.append(Decision(entry.name, False, f"{why}; refused"))
            else:
                found.targets[entry.name] = f"{entry.module}:{entry.attr}"
                found.installed.add(entry.name)
        return found

    @property
    def targets(self) -> dict[str, str | type[Base]]:
        """The target of each candidate."""
        return self._found().targets

    @property
    def installed(self) -> set[str]:
        """The names of the candidates of other packages, by entry points."""
        return self._found().installed

    def __contains__(self, name: object) -> bool:
        return name in self.targets

    def names(self) -> list[str]:
        """Return the candidates in order: built-in ones, entry points, registered ones, and those
        that come last."""
        last = [name for name in self._last if name in self.targets]
        return [*(name for name in self.targets if name not in last), *last]

    def refused(self) -> list[Decision]:
        """Return the decisions about entry points whose name was taken."""
        return self._found().refused

    def register(self, name: str, target: str | type[Base]) -> None:
        """Add a candidate.

        Raises:
            BackendUnavailable: the name is taken, or the target is neither a class of the kind nor
                ``"package.module:Class"``.
        """
        why = ""
        if not name or not isinstance(name, str):
            why = "its name must be a text that is not empty"
        elif name in self.targets:
            why = "the name is registered already; use another name"
        elif not isinstance(target, str):
            self._check(target, name)
        elif not _TARGET.fullmatch(target):
            why = f"expected 'package.module:Class' or the class, got {target!r}"
        if why:
            raise BackendUnavailable(f"Cannot register {self.kind.one} as {name!r}: {why}.")
        self.targets[name] = target

    def unregister(self, name: str) -> None:
        """Remove a candidate that was registered; raise `BackendUnavailable` for another name."""
        if not isinstance(name, str) or name not in self.targets or name in self.built_in:
            raise BackendUnavailable(
                f"Expected the name of a registered {self.kind.noun}, got {name!r}. Pass a name "
                f"that was registered."
            )
        del self.targets[name]

    def check(self, argument: str, name: object) -> str:
        """Return a name that a candidate has, or the text ``"package.module:Class"``.

        Raises:
            PortaKVError: ``kind.unknown``, for anything else; ``argument`` names it.
        """
        path = self._paths and isinstance(name, str) and _TARGET.fullmatch(name)
        if isinstance(name, str) and (name in self.built_in or name in self.targets or path):
            return name
        near = get_close_matches(str(name), self.names(), n=1)
        meant = f"Did you mean {near[0]!r}?" if near else "Pass one of these."
        options = [repr(each) for each in self.names()]
        if self._paths:
            options.append("'package.module:Class'")
        raise self.kind.unknown(
            f"Expected {argument} to be {' or '.join(options)}, got {shown(name)}. {meant}"
        )

    def load(self, name: str) -> type[Base]:
        """Return the class of a candidate, or of ``"package.module:Class"``, imported if need be.

        Raises:
            BackendUnavailable: it is not a class of this kind.
            PortaKVError: ``kind.unknown``, as `check` raises it.
            Exception: whatever the import of another package raises.
        """
        # A built-in candidate is found without a look at the installed packages.
        target = self.built_in.get(name) or self.targets.get(name, name)
        if not isinstance(target, str):
            return target
        if target is name:
            self.check(self.kind.noun, name)
        return self._check(pkgutil.resolve_name(target), name)

    def unknown(self, name: object) -> str:
        """Return the reason to reject a name that no candidate has, with the closest name."""
        names = self.names()
        near = get_close_matches(str(name), names, n=1)
        meant = f" did you mean {near[0]}?" if near else ""
        return f"no such {self.kind.noun};{meant} known are {', '.join(names)}"

    def _check(self, target: object, name: str) -> type[Base]:
        """Return the class of a candidate; raise `BackendUnavailable` for anything else."""
        base = self._base
        if base is None:
            right = callable(target)
        else:
            right = isinstance(target, type) and issubclass(target, base) and not isabstract(target)
        if right:
            return cast("type[Base]", target)
        if base is None:
            raise BackendUnavailable(
                f"Expected {self.kind.noun} {name!r} to be a class, got {target!r}. Name a class."
            )
        methods = ", ".join(sorted(getattr(base, "__abstractmethods__", ())))
        raise BackendUnavailable(
            f"Expected {self.kind.noun} {name!r} to be a subclass of {base.__module__}."
            f"{base.__name__} that implements {methods}, got {target!r}. Name such a class."
        )
