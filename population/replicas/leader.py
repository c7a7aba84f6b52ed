"""The other controllers of a run that has several groups: one per group, each a Ray actor.

The process that was started is the first controller, `NAME`, and leads: the others are `NAME.1`,
`NAME.2` and so on, and end with it. Users are theirs by partition, which they share as controllers
of any names do; a group that dies holds up its own controller alone, and a controller that dies is
started again or leaves its partitions to the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from populace.configs.schema import Settings
from populace.population.ledger.ownership import Ownership
from populace.population.replicas.follower import RemoteFollower
from populace.population.replicas.team import News, Team, are_all_idle, plan_team
from populace.population.watching.views import View
from populace.storage.errors import Fenced, OwnerAlive
from populace.storage.identity import PopulationMeta
from populace.workers.actors.places import (
    free_for,
    groups_of_replicas,
    prefix_of,
    remove_group,
)
from populace.workers.actors.shard import NotTheOwner
from populace.workers.base.registry import PreparedBase

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often the leader looks what the others have to say."""
LEAVE_S = 60.0
"""How long a controller that was asked to stop may take to finish its wave."""


def team_of(settings: Settings, meta: PopulationMeta, store_url: str) -> Team:
    """`plan_team` for the cluster that there is."""
    prefix = prefix_of(meta.name, store_url, settings.run.controller)
    gpus = 0.0 if settings.base.device == "cpu" else free_for(prefix, "GPU")
    cpus = free_for(prefix, "CPU")
    return plan_team(replace(settings, store=store_url), meta.partitions, gpus, cpus)


@dataclass(slots=True)
class _Member:
    """A follower as the leader sees it."""

    settings: Settings
    actor: ActorHandle
    working: Any
    """Reference of what its work comes to."""
    asked: Any = None
    """Reference of its news, while the leader waits for them."""
    is_last: bool = False
    """Its work was over when it was asked."""
    restarts: int = 0
    news: News = field(default_factory=News)
    has_ended: bool = False
    error: Exception | None = None

    @property
    def name(self) -> str:
        return self.settings.run.controller


class Replicas:
    """The followers of a leader, as a context manager: they run inside of it."""

    def __init__(
        self, team: Team, base: PreparedBase, store_url: str, shown: View, stop: threading.Event
    ) -> None:
        """`shown`: where followers say what they do; `stop`: set when the run is to end after its
        waves."""
        self._team, self._base, self._shown, self._stop = team, base, shown, stop
        self.is_alone = len(team.settings) == 1
        """Whether the leader has no followers."""
        name = team.settings[0].name
        self._prefix = {
            own.run.controller: prefix_of(name, store_url, own.run.controller)
            for own in team.settings
        }
        self._members: list[_Member] = []
        self._owners: set[str] = set()
        """What followers are called as holders of partitions, those that died among them."""
        self._was_told_to_stop = self._is_finishing = False
        self.has_finished = False
        """Whether the leader alone is left."""
        self._closed = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True, name="populace-replicas")

    def __enter__(self) -> Self:
        """The leader has joined: groups that a run of its name left, and that nobody will adopt,
        go."""
        leader = self._prefix[self._team.settings[0].run.controller]
        for left in groups_of_replicas(leader) - set(self._prefix.values()):
            remove_group(left)
        if not self.is_alone:
            self._shown.stage(f"{len(self._team.settings)} groups share the partitions")
            self._members = [self._start(own) for own in self._team.settings[1:]]
            self._looking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A second Ctrl-C kills, all else lets waves end. Nothing committed is lost either way."""
        if self.is_alone:
            return
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._stop.set()
            self._wait_until(self._have_ended, LEAVE_S)
        self._closed.set()
        self._looking.join()
        # Somebody else runs under this name, and has adopted the groups.
        is_taken = kind is not None and issubclass(kind, (NotTheOwner, Fenced, OwnerAlive))
        for member in self._members:
            ray.kill(member.actor)
            if not is_taken and not isinstance(member.error, OwnerAlive):
                remove_group(self._prefix[member.name])

    def wait_until_ready(self) -> None:
        """Until every group is loaded; raises what kept one from it."""

        def is_settled() -> bool:
            return all(m.news.is_ready or m.has_ended for m in self._members)

        self._wait_until(lambda: self._stop.is_set() or is_settled())
        for member in self._members:
            if member.error is not None and not member.news.is_ready:
                raise member.error

    def are_idle(self, ownership: Ownership) -> bool:
        """Whether the followers, too, have nothing to learn from, and nobody's partitions wait to
        be taken over. The leader itself is idle."""
        if self.is_alone:
            return True
        living = [member.news for member in self._members if not member.has_ended]
        takeover_s = self._team.settings[0].run.takeover_s
        return are_all_idle(
            living, ownership.ledger.owned(), ownership.holders(takeover_s), self._owners
        )

    def gone(self) -> frozenset[str]:
        """Followers that have ended, as holders of partitions: their last heartbeats count no
        more."""
        living = {member.news.owner for member in self._members if not member.has_ended}
        return frozenset(self._owners - living)

    def finish(self, *, is_drained: bool) -> None:
        """Wait until the followers have done their shares of the waves, or, `is_drained`, have
        nothing to learn from any more. After a stop no longer than a wave may take."""
        if is_drained:
            self._is_finishing = True
            for member in self._members:
                member.actor.finish.remote()
        self._wait_until(lambda: self._have_ended() or self._stop.is_set())
        self._wait_until(self._have_ended, LEAVE_S)
        self.has_finished = True

    def _have_ended(self) -> bool:
        return all(member.has_ended for member in self._members)

    def _start(self, settings: Settings) -> _Member:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Several methods at once: it works, and says what it does.
        actor = RemoteFollower.options(max_concurrency=4, scheduling_strategy=here).remote(
            settings, self._base, self._team.gpus
        )
        return _Member(settings=settings, actor=actor, working=actor.work.remote())

    def _wait_until(self, holds: Callable[[], bool], at_most_s: float | None = None) -> None:
        deadline = None if at_most_s is None else time.monotonic() + at_most_s
        while not holds() and (deadline is None or time.monotonic() < deadline):
            time.sleep(LOOK_S)

    # In a thread of its own.

    def _look(self) -> None:
        while not self._closed.wait(LOOK_S):
            if self._stop.is_set() and not self._was_told_to_stop:
                self._was_told_to_stop = True
                for member in self._members:
                    member.actor.stop.remote()
            for member in self._members:
                if not member.has_ended:
                    try:
                        self._look_at(member)
                    except Exception as error:  # whatever it is, the run must not wait for ever
                        logger.exception("looking after %s", member.name)
                        self._has_failed(member, error)

    def _look_at(self, member: _Member) -> None:
        """Pass on what it says, and see whether it ended. Waits for nobody."""
        if member.asked is None:
            # Looked at first, so that the last words come after the end.
            member.is_last = bool(ray.wait([member.working], timeout=0)[0])
            member.asked = member.actor.news.remote()
        if not ray.wait([member.asked], timeout=0)[0]:
            return
        asked, member.asked = member.asked, None
        try:
            member.news = news = ray.get(asked)
            self._owners |= {news.owner} - {""}
            for hook, arguments in news.said:
                if hook == "stage":
                    arguments = (f"{member.name}: {arguments[0]}",)
                getattr(self._shown, hook)(*arguments)
                member.restarts = 0 if hook == "wave" else member.restarts
            if member.is_last:
                ray.get(member.working)
                member.has_ended = True
        except RayActorError as error:
            self._start_again(member, error)
        except RayTaskError as error:
            self._has_failed(member, error.cause if isinstance(error.cause, Exception) else error)

    def _has_failed(self, member: _Member, error: Exception) -> None:
        member.error, member.has_ended = error, True
        self._shown.stage(f"{member.name} ended, the others take its partitions: {error}")

    def _start_again(self, member: _Member, error: Exception) -> None:
        """Its process died. Its group lives, and is found again under its name."""
        member.restarts += 1
        if self._stop.is_set() or member.restarts > member.settings.shard.max_restarts:
            self._has_failed(member, error)
            return
        self._shown.stage(f"the process of {member.name} died; starting it again")
        again = self._start(member.settings)
        member.actor, member.working, member.news = again.actor, again.working, News()
        if self._is_finishing:
            member.actor.finish.remote()
