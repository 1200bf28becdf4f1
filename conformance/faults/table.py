# SPDX-License-Identifier: Apache-2.0
"""The faults: their names, the means by which each is put in, and what is done.

Each fault is a function over a `Trial`. It stores blocks, breaks something, and loads the blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from portakv_conformance.faults import damage, places
from portakv_conformance.faults.damage import Damage
from portakv_conformance.faults.intercept import (
    GO_ON,
    Action,
    Answer,
    Intercepted,
    Rule,
    fails,
    hangs,
    kills,
    read_flipped,
    read_short,
    read_zeros,
    waits,
    write_astray,
    write_lost,
    write_short,
    write_torn,
)
from portakv_conformance.faults.subject import NotInjected, Raised
from portakv_conformance.faults.trial import CLOSING, KEYS, LATER, OTHER_MODEL, Ended, Trial

#: How a fault is put in.
FILES = "files changed from outside"
CALLS = "system calls answered (seccomp)"
PROCESS = "processes"
MEMORY = "order of calls"
CLOCK = "Python's time.time replaced"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: of the fault, unique.
        means: by which it is put in.
        run: puts it in and judges.
    """

    name: str
    means: str
    run: Callable[[Trial], None]


def _damaged(name: str, change: Damage, live: bool = True, closed: bool = True) -> list[Fault]:
    """Return the faults of a damage: while the tier is open, and while it is closed."""

    def while_open(trial: Trial) -> None:
        trial.start()
        trial.put()
        change(trial, trial.places())
        trial.injected += 1
        trial.get()
        trial.put()
        trial.get()

    def while_closed(trial: Trial) -> None:
        trial.start()
        trial.put()
        trial.stop()
        change(trial, trial.places())
        trial.injected += 1
        trial.start()
        trial.get()
        trial.put()
        trial.get()

    made = []
    if live:
        made.append(Fault(f"{name}, open", FILES, while_open))
    if closed:
        made.append(Fault(f"{name}, closed", FILES, while_closed))
    return made


def _stale_files(blocks_only: bool) -> Callable[[Trial], None]:
    """Return the fault of files of an earlier time: those with blocks, or all of them."""

    def run(trial: Trial) -> None:
        trial.start()
        trial.put()
        trial.stop()
        copies = places.copied(trial.folder, damage.new_folder(trial, "earlier"))
        trial.start()
        trial.put(LATER)
        trial.stop()
        found = trial.places([*KEYS, *LATER])
        if blocks_only:
            with_blocks = {place.path for place in found.values()}
            copies = [(path, copy) for path, copy in copies if path in with_blocks]
        places.put_back(copies)
        trial.injected += 1
        trial.start()
        trial.get([*KEYS, *LATER])

    return run


# --- system calls ---------------------------------------------------------------------------------


def _answered(
    name: str,
    kinds: str,
    action: Action,
    in_store: bool,
    skip: int = 0,
    times: int | None = None,
    least: int = 0,
    first: bool = True,
) -> Fault:
    """Return the fault of system calls that fail, during a store or during a load.

    Args:
        first: the store is the first one of the tier; else other blocks were stored before.
    """
    watched = tuple(kinds.split())

    def during_store(trial: Trial) -> None:
        rule = Rule(watched, action, skip, times, least)
        trial.start(watched)
        if not first:
            trial.put(LATER)
        trial.arm(rule)
        trial.put()
        trial.lift(rule)
        trial.get()
        trial.put()
        trial.get()
        trial.stop()
        trial.start()
        trial.get()

    def during_load(trial: Trial) -> None:
        rule = Rule(watched, action, skip, times, least)
        trial.start(watched)
        trial.put()
        trial.arm(rule)
        trial.get()
        trial.lift(rule)
        trial.put()
        trial.get()

    return Fault(name, CALLS, during_store if in_store else during_load)


def _on_open(name: str, action: Action) -> Fault:
    """Return the fault of files that cannot be opened, from the opening of the tier on."""

    def run(trial: Trial) -> None:
        trial.start()
        trial.put()
        trial.stop()
        rule = Rule(("open",), action)
        with suppress(Ended):
            trial.start(("open",), rule=rule)
            trial.get()
        trial.lift(rule)
        trial.kill()
        trial.start()
        trial.get()

    return Fault(name, CALLS, run)


def _race(name: str, change: Callable[[Path, Sequence[Path]], None]) -> Fault:
    """Return the fault of a block's file that changes between the lookup and the load."""

    def run(trial: Trial) -> None:
        trial.start(("open",))
        trial.put()
        found = trial.places()
        paths = [place.path for place in found.values()]
        if len({*paths}) < len(paths):
            raise NotInjected("its blocks share files, which stay open")

        def action(call: Intercepted) -> Answer:
            change(Path(call.path), paths)
            return GO_ON

        def is_block(call: Intercepted) -> Answer:
            return action(call) if Path(call.path) in paths else GO_ON

        rule = Rule(("open",), is_block)
        trial.arm(rule)
        trial.get()
        trial.lift(rule)
        trial.put()
        trial.get()

    return Fault(name, CALLS, run)


def _vanish(path: Path, paths: Sequence[Path]) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


def _exchange(path: Path, paths: Sequence[Path]) -> None:
    """Put another block's file in the place of one, by a rename."""
    other = paths[(paths.index(path) + 1) % len(paths)]
    aside = path.with_name(f"{path.name}.race")
    with suppress(FileNotFoundError):
        shutil.copyfile(other, aside)
        aside.rename(path)


def _unlink_fails(trial: Trial) -> None:
    rule = Rule(("unlink",), fails("EIO"))
    trial.start(("unlink",))
    trial.put()
    trial.arm(rule)
    _call(trial, "delete", [*KEYS])
    trial.lift(rule)
    trial.get()


def _call(trial: Trial, name: str, *args: object) -> object:
    """Make a call of the family; what it raises is the tier's own affair, and noted."""
    assert trial.child is not None
    try:
        return trial.child.call(name, *args)
    except Raised as error:
        trial.notes.append(str(error))
        return None


# --- processes ------------------------------------------------------------------------------------


def _killed(name: str, kinds: str, skip: int, in_store: bool = True) -> Fault:
    """Return the fault of a process that is killed in a system call."""
    watched = tuple(kinds.split())

    def run(trial: Trial) -> None:
        rule = Rule(watched, kills, skip)
        trial.start(watched)
        if not in_store:
            trial.put()
        trial.arm(rule)
        trial.dies("put" if in_store else "get", [*KEYS])
        if not rule.hits:
            raise NotInjected(f"fewer than {skip + 1} such calls were seen: {rule.seen}")
        trial.start()
        trial.get()
        trial.put()
        trial.get()

    return Fault(name, CALLS, run)


def _killed_after(trial: Trial) -> None:
    trial.start()
    trial.put()
    trial.kill()
    trial.injected += 1
    trial.start()
    trial.get()
    trial.put()
    trial.get()


def _restarted(trial: Trial) -> None:
    for _ in range(3):
        trial.start()
        trial.put()
        trial.get()
        trial.stop()
    trial.injected += 1
    trial.start()
    trial.get()


def _two_writers(trial: Trial) -> None:
    """Let two processes store the same keys into one folder."""
    trial.start()
    other = trial.second()
    try:
        other.call("open")
        trial.put(range(4))
        other.call("put", [*KEYS])
        trial.put()
    except Raised as error:
        trial.add("error", f"second process: {error}")
        trial.put()
    trial.injected += 1
    trial.get()
    trial.stop()
    other.end()
    trial.start()
    trial.get()


def _other_model(trial: Trial) -> None:
    """Let another model store the same keys into one folder first."""
    trial.start(model=OTHER_MODEL)
    trial.put()
    trial.stop()
    trial.injected += 1
    trial.start()
    trial.get()
    trial.put()
    trial.get()


# --- memory and the order of calls ----------------------------------------------------------------


def _reused_source(trial: Trial) -> None:
    """Use the source of a store for something else as soon as the tier reports its end."""
    trial.start()
    for start in range(0, 64, 8):
        trial.put(range(start, start + 8))
        trial.get(range(start, start + 8))
    trial.injected += 1


def _closed_in(loads: bool) -> Callable[[Trial], None]:
    """Return the fault of memory that is used again after a close with a call in flight."""
    kind = "read" if loads else "write"

    def run(trial: Trial) -> None:
        rule = Rule((kind,), hangs, least=4096)
        trial.start((kind,))
        if loads:
            trial.put()
        trial.arm(rule)
        assert trial.child is not None
        child = trial.child
        child.call("begin", loads, [*KEYS])
        _until_held(trial, rule)
        child.call("release_memory")
        early = child.call("released", CLOSING, deadline=2 * CLOSING)
        if early is None:
            # The tier waits for its call, so that its memory stays.
            trial.lift(rule)
            early = child.call("released", CLOSING, deadline=2 * CLOSING)
        if early is None:
            trial.add("hang", "the memory was not released after the call went on")
            return
        if early:
            trial.add("error", f"{early}; the memory has to stay")
            return
        child.call("reuse")
        if rule.hits and trial.calls.held:
            trial.lift(rule)
        trial.settle()
        untouched = child.call("reused")
        trial.add("right" if untouched else "wrong bytes", _REUSED[untouched])
        trial.kill()
        trial.start()
        trial.get()

    return run


_REUSED = {True: "", False: "memory was written after it was released"}


def _until_held(trial: Trial, rule: Rule) -> None:
    """Wait until a call is held; raise `NotInjected` if none comes."""
    for _ in range(5):
        if rule.hits:
            trial.injected += 1
            return
        trial.settle()
    raise NotInjected(f"no call to {rule.kinds[0]} 4 KiB or more was seen")


def _lookup_disagrees(trial: Trial) -> None:
    """Remove the files of blocks after a lookup, and load without another one."""
    trial.start()
    trial.put()
    found = trial.places()
    _call(trial, "exists", [*KEYS])
    places.remove({place.path for place in found.values()})
    trial.injected += 1
    trial.get(blind=True)
    trial.put()
    trial.get()


def _never_stored(trial: Trial) -> None:
    """Load blocks that were never stored among others, without a lookup."""
    trial.start()
    trial.put()
    trial.injected += 1
    trial.get([2, 40, 3, 41, 42, 5], blind=True, absent=[40, 41, 42])
    trial.get()


def _stale_lease(trial: Trial) -> None:
    """Remove blocks that are pinned by a lookup, then load them."""
    trial.start()
    trial.put()
    _call(trial, "lease", [*KEYS])
    _call(trial, "delete", [*KEYS])
    trial.injected += 1
    trial.get(blind=True)
    trial.put()
    trial.get()


def _lease_of_the_dead(trial: Trial) -> None:
    """Kill a process that has pinned blocks; remove and load them in the next one."""
    trial.start()
    trial.put()
    _call(trial, "lease", [*KEYS])
    trial.kill()
    trial.injected += 1
    trial.start()
    trial.get()
    _call(trial, "delete", [*KEYS])
    trial.put()
    trial.get()


def _many(trial: Trial) -> None:
    """Store many times what fits into the usual terms, and load all of it."""
    trial.start()
    for start in range(0, 768, 16):
        trial.put(range(start, start + 16))
    trial.injected += 1
    for start in range(0, 768, 16):
        trial.get(range(start, start + 16))


def _jump(seconds: float) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        trial.start()
        trial.put()
        assert trial.child is not None
        trial.child.call("jump", seconds)
        trial.get()
        trial.put(LATER)
        trial.get([*KEYS, *LATER])
        reads = trial.child.call("jumps")
        if not reads:
            raise NotInjected("its Python code does not read the clock by time.time")
        trial.injected += reads

    return run


# --- the table ------------------------------------------------------------------------------------


def _file_faults() -> list[Fault]:
    return [
        *_damaged("first bit of a block flipped", damage.flipped(0.0)),
        *_damaged("a bit in a block's middle flipped", damage.flipped(0.5)),
        *_damaged("last bit of a block flipped", damage.flipped(1.0)),
        *_damaged("a bit before each block flipped", damage.flip_around("before")),
        *_damaged("a bit after the last block flipped", damage.flip_around("after"), live=False),
        *_damaged("a bit of each other file flipped", damage.flip_others),
        *_damaged("two blocks swapped", damage.swapped(False)),
        *_damaged("two blocks swapped with what precedes them", damage.swapped(True)),
        *_damaged("a page of a block zeroed", damage.zeroed(places.PAGE)),
        *_damaged("a block zeroed", damage.zeroed(None), live=False),
        *_damaged("a block torn: its end is another's", damage.torn),
        *_damaged("a sector of a block overwritten", damage.sector, live=False),
        *_damaged("a file cut in a block", damage.cut(0.5)),
        *_damaged("a file cut to nothing", damage.cut(None), live=False),
        *_damaged("random bytes appended to files", damage.lengthened, live=False),
        *_damaged("a block copied over another key's", damage.copied_over),
        *_damaged(
            "blocks of another model in their places", damage.of_other_model(False), live=False
        ),
        *_damaged(
            "files of another model under their names", damage.of_other_model(True), live=False
        ),
        Fault("files with blocks put back to an earlier time", FILES, _stale_files(True)),
        Fault("all files put back to an earlier time", FILES, _stale_files(False)),
        *_damaged("a block's file removed", damage.removed(3)),
        *_damaged("all files with blocks removed", damage.removed(None)),
        *_damaged("the folder removed", damage.folder_removed, closed=False),
        *_damaged("the folder emptied", damage.folder_emptied, live=False),
        *_damaged("all other files removed", damage.others_removed, live=False),
        *_damaged("all other files emptied", damage.others_emptied, live=False),
        *_damaged("a folder in a block's file's place", damage.replaced("folder")),
        *_damaged(
            "a link to itself in a block's file's place", damage.replaced("link"), live=False
        ),
        *_damaged("a pipe in a block's file's place", damage.replaced("pipe")),
        *_damaged("file times of 2100", damage.times(4102444800), live=False),
        *_damaged("file times of 1970", damage.times(0), live=False),
        *_damaged("halves of files left by a dead writer", damage.left_over, live=False),
    ]


def _call_faults() -> list[Fault]:
    return [
        _answered("EIO of reads", "read", fails("EIO"), False),
        _answered("EIO of one read", "read", fails("EIO"), False, times=1),
        _answered("ESTALE of reads", "read", fails("ESTALE"), False),
        _answered("EINTR of one read", "read", fails("EINTR"), False, times=1),
        _answered("EIO of writes", "write", fails("EIO"), True),
        _answered("EIO of the third write", "write", fails("EIO"), True, skip=2, times=1),
        _answered("ENOSPC of writes", "write", fails("ENOSPC"), True),
        _answered("ENOSPC after three writes", "write", fails("ENOSPC"), True, skip=3),
        _answered("EDQUOT of writes", "write", fails("EDQUOT"), True),
        _answered("ENOSPC of sizes and folders", "size mkdir", fails("ENOSPC"), True),
        _answered("EIO of fsync", "sync", fails("EIO"), True),
        _answered("EIO of rename", "rename", fails("EIO"), True),
        Fault("EIO of unlink", CALLS, _unlink_fails),
        _answered("EMFILE of opens for a store", "open", fails("EMFILE"), True),
        _answered("EMFILE of opens for a load", "open", fails("EMFILE"), False),
        _answered("EROFS of opens for a store", "open", fails("EROFS"), True),
        _on_open("EACCES of opens from the start", fails("EACCES")),
        _on_open("EIO of opens from the start", fails("EIO")),
        _answered("EIO of lookups", "look", fails("EIO"), False),
        _answered("reads end early", "read", read_short, False, least=places.PAGE),
        _answered("reads bring a flipped bit", "read", read_flipped, False, least=places.PAGE),
        _answered("reads bring zeros", "read", read_zeros, False, least=places.PAGE),
        _answered("writes end early", "write", write_short, True, least=2),
        _answered("writes torn, reported as whole", "write", write_torn, True, least=places.PAGE),
        _answered("writes lost, reported as done", "write", write_lost, True, least=places.PAGE),
        _answered("a write astray by a page", "write", write_astray, True, 1, 1, places.PAGE),
        _answered("hang of reads", "read", hangs, False),
        _answered("hang of the first writes", "write", hangs, True),
        _answered("hang of later writes", "write", hangs, True, first=False),
        _answered("hang of the first fsync", "sync", hangs, True),
        _answered("hang of later fsync", "sync", hangs, True, first=False),
        _answered("hang of opens for a load", "open", hangs, False),
        _answered("hang of lookups", "look", hangs, False),
        _answered("slow reads", "read", waits(0.1), False),
        _answered("slow writes", "write", waits(0.1), True),
        _race("a file removed between lookup and load", _vanish),
        _race("a file replaced between lookup and load", _exchange),
    ]


def _process_faults() -> list[Fault]:
    return [
        _killed("killed in the first write", "write", 0),
        _killed("killed in the fifth write", "write", 4),
        _killed("killed in a rename", "rename", 3),
        _killed("killed in fsync", "sync", 0),
        _killed("killed in a load", "read", 1, in_store=False),
        Fault("killed after a store", PROCESS, _killed_after),
        Fault("closed and opened three times", PROCESS, _restarted),
        Fault("two writers of the same keys", PROCESS, _two_writers),
        Fault("another model's blocks of the same keys", PROCESS, _other_model),
        Fault("a source reused after its store", MEMORY, _reused_source),
        Fault("memory reused after a load was given up", CALLS, _closed_in(True)),
        Fault("memory reused after a store was given up", CALLS, _closed_in(False)),
        Fault("files removed between lookup and load", MEMORY, _lookup_disagrees),
        Fault("keys that were never stored", MEMORY, _never_stored),
        Fault("a lease on blocks that were removed", MEMORY, _stale_lease),
        Fault("a lease of a process that was killed", PROCESS, _lease_of_the_dead),
        Fault("more blocks than fit", MEMORY, _many),
        Fault("the clock a day ahead", CLOCK, _jump(86400.0)),
        Fault("the clock a day back", CLOCK, _jump(-86400.0)),
    ]


#: Every fault, in the order of the report.
FAULTS: tuple[Fault, ...] = (*_file_faults(), *_call_faults(), *_process_faults())
