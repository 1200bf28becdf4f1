# SPDX-License-Identifier: Apache-2.0
"""Two model engines that hand requests over: one computes prompts, the other goes on with them.

Offers end at any time, pulls go on at any time and read the rows in one step and commit them in
another, the first engine is killed and started anew, and requests are aborted on either side. A
row tells its token and all tokens before it, so rows that are stale are seen when the second engine
computes with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from secrets import token_bytes

from portakv.migrate.messages import Named
from portakv.serving import Plan, SchedulerSide
from portakv.serving.handover import Endpoint
from portakv.serving.plan import OfferJob, PullJob, RemoteRows
from support.serving_model import LIMIT, NOTHING, Draw, Engine, Load, Request, Store, Worker

LEASE = 4.0  # seconds; the clock of a scheduler side ticks in fifths
PATIENCE = 40  # steps for which a pull waits for its offer


class HandingStore(Store):
    """A store of an engine without a window."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.window = None
        super().__init__(chance, draw)


class Held:
    """An offer of one worker."""

    def __init__(self, worker: HandingWorker, job: OfferJob) -> None:
        self.worker = worker
        self.job = job
        self.holds = True

    def row(self, token: int) -> int:
        """Return a row."""
        size = self.worker.engine.draw.block_size
        return self.worker.row(self.job.blocks[0][token // size], token % size)


class Network:
    """What engines know of each other: the offers by their tickets, and prompts that were computed.

    Attributes:
        prompts: with the rows that an engine keeps for them.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.offers = dict[tuple[str, bytes, bytes], Held]()
        self.prompts = list[tuple[list[int], RemoteRows]]()

    def find(self, ticket: bytes) -> Held | None:
        """Return the offer of a ticket."""
        named = Named.read(ticket)
        assert named is not None
        return self.offers.get((named.address, named.epoch, named.name))


@dataclass
class Pulling:
    """A pull of one worker. ``rows``: those that it has read; ``waited``: steps for the offers."""

    job: PullJob
    rows: list[int] | None = None
    waited: int = 0


class HandingWorker(Worker):
    """A worker that offers and pulls rows."""

    def __init__(self, engine: Engine, number: int) -> None:
        super().__init__(engine, number)
        assert isinstance(engine, HandingEngine)
        self.network = engine.network
        self.endpoint = Endpoint(f"worker {number}", token_bytes(16))
        self.offers = dict[bytes, Held]()
        self.pulls = list[Pulling]()

    @property
    def busy(self) -> bool:
        return super().busy or bool(self.offers or self.pulls)

    def reading(self) -> set[str]:
        return super().reading() | {held.job.request for held in self.offers.values()}

    def after_step(self, plan: Plan) -> None:
        for job in plan.handovers.offers:
            held = Held(self, job)
            self.offers[job.name] = held
            key = (*self.endpoint, job.name)
            self.network.offers[key] = held
        self.pulls += [Pulling(job) for job in plan.handovers.pulls]
        for ticket in plan.handovers.released if self.number == 0 else ():
            released = self.network.find(ticket)
            if released is not None and self.engine.chance.random() < 0.8:  # else it is lost
                released.holds = False
        for name, held in [*self.offers.items()]:
            if self.engine.chance.random() < 0.05:  # the lease is over
                held.holds = False
            if not held.holds:
                del self.offers[name]
        for pulling in [*self.pulls]:
            if self.engine.chance.random() < self.engine.draw.speed:
                self._pull(pulling)
        super().after_step(plan)

    def _pull(self, pulling: Pulling) -> None:
        """Let a pull go on: it reads all rows, then commits them if the offers still hold."""
        job = pulling.job
        sources = [self.network.find(ticket) for ticket in job.tickets]
        holding = [source for source in sources if source is not None and source.holds]
        if len(holding) < len(sources):
            gone = any(source is not None and not source.holds for source in sources)
            pulling.waited += 1
            if gone or pulling.rows is not None or pulling.waited > PATIENCE:
                self._end(pulling, landed=False)
        elif pulling.rows is None:
            source = self.engine.chance.choice(holding)
            pulling.rows = [source.row(token) for token in range(job.first, job.tokens)]
        else:
            size = self.engine.draw.block_size
            for token, row in enumerate(pulling.rows, job.first):
                block = job.blocks[0][token // size]
                assert block >= 0, "a pull writes a block that is not its own"
                self.write(block, token % size, row)
            self._end(pulling, landed=True)

    def _end(self, pulling: Pulling, landed: bool) -> None:
        self.pulls.remove(pulling)
        if not landed:
            size = self.engine.draw.block_size
            for block in pulling.job.blocks[0]:
                for at in range(size if block >= 0 else 0):
                    self.write(block, at, NOTHING)  # after an error rows are undefined
        self.report.end(pulling.job.number, frozenset() if landed else frozenset({0}))


class HandingEngine(Engine):
    """An engine that computes prompts for others, or goes on with theirs.

    Args:
        prefills: half of its requests end with their prompt, and go on in another engine.
    """

    def __init__(
        self, made: type[SchedulerSide], seed: int, network: Network, prefills: bool
    ) -> None:
        self.network = network
        self.prefills = prefills
        self.handing = set[Request]()
        super().__init__(made, seed, HandingStore, HandingWorker)
        if prefills:
            self.scheduler_side.open_offers([worker.endpoint for worker in self.workers], LEASE)

    def act(self) -> None:
        if not self.prefills and self.network.prompts and self.chance.random() < 0.5:
            self.take_over(self.chance.choice(self.network.prompts))
        super().act()

    def add(self) -> None:
        before = {*self.requests}
        super().add()
        for name in self.requests.keys() - before:
            if self.prefills and self.chance.random() < 0.6:
                self.handing.add(self.requests[name])

    def take_over(self, handed: tuple[list[int], RemoteRows]) -> None:
        """Go on with a prompt, perhaps one that was taken before."""
        prompt, rows = handed
        if self.chance.random() < 0.9:
            self.network.prompts.remove(handed)
        tokens = [*prompt]
        wanted = len(tokens) + self.chance.randint(1, 6)
        if -(-wanted // self.draw.block_size) > self.draw.blocks:
            return
        request = Request(f"h{len(self.requests)}", tokens, wanted, handed=True)
        self.requests[request.name] = request
        self.scheduler_side.add(request.name, request.tokens, remote=rows)
        self.waiting.append(request)

    def advance(self, request: Request) -> None:
        """End a request whose prompt was computed, if another engine is to go on."""
        if request not in self.handing or request.state != "running":
            super().advance(request)
            return
        if request.computed < len(request.tokens):
            return
        self.running.remove(request)
        blocks = (tuple(request.blocks),)
        rows = self.scheduler_side.offer(request.name, len(request.tokens), blocks)
        self.finish(request)
        if rows is not None:
            self.network.prompts.append(([*request.tokens], rows))

    def schedule(self) -> tuple[Plan, dict[Request, tuple[list[int], int]]]:
        plan, until = super().schedule()
        for job in plan.handovers.pulls:
            self.loads[job.number] = Load(self.requests[job.request], job)
        return plan, until

    def past_of(self, load: Load) -> int:
        if not isinstance(load.job, PullJob):
            return super().past_of(load)
        request = load.request
        if load.missing:
            return request.computed
        # The engine needs the logits of the last token, and computes it again.
        return min(request.computed + request.load_tokens, len(request.tokens) - 1)


def walk(made: type[SchedulerSide], seed: int, steps: int) -> tuple[HandingEngine, HandingEngine]:
    """Let two engines serve and hand requests over, and return them after the last request."""
    chance = random.Random(seed)
    network = Network(chance)
    prefill = HandingEngine(made, 2 * seed, network, prefills=True)
    decode = HandingEngine(made, 2 * seed + 1, network, prefills=False)
    for _ in range(steps):
        if chance.random() < 0.03:
            network.offers.clear()  # the prefill engine is killed, and starts anew
            prefill = HandingEngine(made, chance.randrange(1 << 30), network, prefills=True)
        for engine in chance.sample([prefill, decode], 2):
            engine.act()
    for _ in range(LIMIT):
        if prefill.settled and decode.settled:
            break
        prefill.step()
        decode.step()
    prefill.check_end()
    decode.check_end()
    return prefill, decode
