"""The other controllers of a run that has several groups: one per group, each a Ray actor.

The process that was started is the first controller, `NAME`, and leads: the others are `NAME.1`,
`NAME.2` and so on, and end with it. Users are theirs by partition, which they share as controllers
of any names do; a group that dies holds up its own controller alone, and a controller that dies is
started again or leaves its partitions to the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from populace.configs.schema import Settings
from populace.population.ledger.heartbeat import UNKNOWN
from populace.population.ledger.ownership import Ownership
from populace.population.replicas.follower import News, RemoteFollower
from populace.population.replicas.team import Team, plan_team
from populace.population.watching.views import View
from populace.storage.identity import PopulationMeta
from populace.workers.actors.places import gpus_for, groups_of_replicas, prefix_of, remove_group
from populace.workers.base.registry import PreparedBase

LOOK_S = 0.2
"""How often the leader looks what the others have to say."""
ANSWER_S = 30.0
"""After which a controller that doesn't say anything is looked at again later."""
LEAVE_S = 60.0
"""How long a controller that was asked to stop may take to finish its wave."""


def team_of(settings: Settings, meta: PopulationMeta, store_url: str) -> Team:
    """`plan_team` for the cluster that there is."""
    prefix = prefix_of(meta.name, store_url, settings.run.controller)
    gpus = 0.0 if settings.base.device == "cpu" else gpus_for(prefix)
    return plan_team(replace(settings, store=store_url), meta.partitions, gpus)


@dataclass(slots=True)
class _Member:
    """A follower as the leader sees it."""

    settings: Settings
    actor: ActorHandle
    working: Any
    """Reference of what its work comes to."""
    restarts: int = 0
    news: News = field(default_factory=News)
    has_ended: bool = False
    error: Exception | None = None

    @property
    def name(self) -> str:
        return self.settings.run.controller


class _Serialised(View):
    """A view that several threads may tell."""

    def __init__(self, view: View) -> None:
        self._view, self._lock = view, threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        hook, lock = getattr(self._view, name), self._lock

        def told(*arguments: Any) -> None:
            with lock:
                hook(*arguments)

        return told


class Replicas:
    """The followers of a leader, as a context manager: they run inside of it."""

    def __init__(
        self, team: Team, base: PreparedBase, store_url: str, view: View, stop: threading.Event
    ) -> None:
        """`stop`: set when the run is to end after its waves."""
        self._team, self._base, self._stop = team, base, stop
        self._is_alone = len(team.settings) == 1
        self.view: View = view if self._is_alone else _Serialised(view)
        """Where the leader, too, says what it does."""
        name = team.settings[0].name
        self._prefix = {
            own.run.controller: prefix_of(name, store_url, own.run.controller)
            for own in team.settings
        }
        self._members: list[_Member] = []
        self._owners: set[str] = set()
        """What followers are called as holders of partitions, those that died among them."""
        self._was_told_to_stop = self._is_finishing = False
        self._closed = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True, name="populace-replicas")

    def __enter__(self) -> Self:
        """The leader has joined: groups that a run of its name left, and that nobody will adopt,
        go."""
        leader = self._prefix[self._team.settings[0].run.controller]
        for left in groups_of_replicas(leader) - set(self._prefix.values()):
            remove_group(left)
        if not self._is_alone:
            self.view.stage(f"{len(self._team.settings)} groups share the population's partitions")
            self._members = [self._start(own) for own in self._team.settings[1:]]
            self._looking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A second Ctrl-C kills, all else lets waves end. Nothing committed is lost either way."""
        if self._is_alone:
            return
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._stop.set()
            self._wait_until(lambda: all(m.has_ended for m in self._members), LEAVE_S)
        self._closed.set()
        self._looking.join()
        for member in self._members:
            ray.kill(member.actor)
            if not member.has_ended or member.error is not None:
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
        if self._is_alone:
            return True
        living = [member.news for member in self._members if not member.has_ended]
        if not all(news.is_idle for news in living):
            return False
        takeover_s = self._team.settings[0].run.takeover_s
        ours = frozenset(ownership.ledger.owned()).union(*(news.partitions for news in living))
        nobodys = {None, UNKNOWN, *self._owners}
        return all(
            partition in ours or holder not in nobodys
            for partition, holder in ownership.holders(takeover_s).items()
        )

    def finish(self) -> None:
        """Let the followers do what is left of their shares of the waves, and wait for them."""
        self._is_finishing = True
        for member in self._members:
            member.actor.finish.remote()
        self._wait_until(lambda: all(m.has_ended for m in self._members))

    def _start(self, settings: Settings) -> _Member:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Two methods at once: it works, and says what it does.
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
                    self._look_at(member)

    def _look_at(self, member: _Member) -> None:
        """Pass on what it says, and see whether it ended."""
        # Before its last words are fetched.
        ended, _ = ray.wait([member.working], timeout=0)
        try:
            member.news = news = ray.get(member.actor.news.remote(), timeout=ANSWER_S)
            self._owners |= {news.owner} - {""}
            for hook, arguments in news.said:
                if hook == "stage":
                    arguments = (f"{member.name}: {arguments[0]}",)
                getattr(self.view, hook)(*arguments)
                member.restarts = 0 if hook == "wave" else member.restarts
            if ended:
                ray.get(member.working)
                member.has_ended = True
        except GetTimeoutError:
            return
        except RayActorError as error:
            self._start_again(member, error)
        except Exception as error:
            member.error = error.cause if isinstance(error, RayTaskError) else error
            member.has_ended = True
            self.view.stage(f"{member.name} ended, the others take its partitions: {member.error}")

    def _start_again(self, member: _Member, error: Exception) -> None:
        """Its process died. Its group lives, and is found again under its name."""
        limit = member.settings.shard.max_restarts
        member.restarts += 1
        if self._stop.is_set() or self._closed.is_set() or member.restarts > limit:
            member.has_ended, member.error = True, error
            return
        self.view.stage(f"the process of {member.name} died; starting it again")
        again = self._start(member.settings)
        member.actor, member.working = again.actor, again.working
        member.news = News()
        if self._is_finishing:
            member.actor.finish.remote()
