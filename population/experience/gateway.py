"""The gateway: a Ray actor through which many small producers share segments, and which alone needs
keys and store.

    gateway = Gateway.start("s3://people", "assistants")    # once; `stream.gateway: true` does it
    gateway = Gateway.connect("s3://people", "assistants")  # anywhere in the cluster
    gateway.enqueue("ada", [Trajectory(...)])               # durable when it returns

The actor is detached and starts again when it dies. A call that it died in is sent again: events
have ids, so a repetition trains nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from populace.configs.schema import StreamSettings
from populace.population.experience.contract import Checked, Enqueues
from populace.population.experience.producer import Producer
from populace.storage.errors import InvalidInput, OutcomeUnknown, PopulaceError
from populace.storage.keys.keyring import Keyring
from populace.storage.objects.open import open_store

NAMESPACE = "populace"
MAX_CALLS = 1000
"""Calls that the actor holds at a time; more wait at their callers."""
MAX_TRIES = 20


class GatewayActor:
    """One `Producer` for everybody."""

    def __init__(self, store_url: str, name: str, stream: StreamSettings, keys_folder: str) -> None:
        keyring = Keyring(Path(keys_folder))
        self._producer = Producer.open(store_url, name, settings=stream, keyring=keyring)

    async def enqueue(self, events: Checked) -> int:
        """Make checked events durable; returns their number."""
        return await self._producer.send_async(events)

    async def pid(self) -> int:
        return os.getpid()


class Gateway(Enqueues):
    """What producers hold."""

    def __init__(self, actor: ActorHandle, rewards: Mapping[str, str] | None) -> None:
        self._actor, self.rewards = actor, rewards

    @staticmethod
    def start(
        store_url: str,
        name: str,
        *,
        rewards: Mapping[str, str] | None = None,
        stream: StreamSettings | None = None,
    ) -> Gateway:
        """The gateway of a population, started if there is none."""
        store_url = open_store(store_url).url
        options = ray.remote(GatewayActor).options(
            name=_actor_name(store_url, name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=MAX_TRIES,
            max_concurrency=MAX_CALLS,
        )
        settings = stream or StreamSettings()
        actor = options.remote(store_url, name, settings, str(Keyring().folder))
        _get(actor.pid.remote())
        return Gateway(actor, rewards)

    @staticmethod
    def connect(store_url: str, name: str, *, rewards: Mapping[str, str] | None = None) -> Gateway:
        """The gateway that runs already; `InvalidInput` if there is none."""
        store_url = open_store(store_url).url
        try:
            actor = ray.get_actor(_actor_name(store_url, name), namespace=NAMESPACE)
        except ValueError:
            raise InvalidInput(
                f"no gateway of population {name!r} in {store_url} runs in this Ray cluster; start "
                "it with Gateway.start, or run the population with stream.gateway=true"
            ) from None
        return Gateway(actor, rewards)

    def send(self, events: Checked) -> int:
        num_events: int = _get(self._actor.enqueue.remote(events))
        return num_events

    async def send_async(self, events: Checked) -> int:
        try:
            num_events: int = await self._actor.enqueue.remote(events)
            return num_events
        except (RayTaskError, RayActorError) as error:
            raise _plain(error) from None

    def stop(self) -> None:
        """Remove the actor; what it acknowledged is durable."""
        ray.kill(self._actor)


def _actor_name(store_url: str, name: str) -> str:
    return f"{name}-{sha256(store_url.encode()).hexdigest()[:8]}/gateway"


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (RayTaskError, RayActorError) as error:
        raise _plain(error) from None


def _plain(error: RayTaskError | RayActorError) -> Exception:
    """What the gateway raised, or that it is gone."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, PopulaceError) else error
    return OutcomeUnknown(
        f"the gateway died and did not come back: {error}; send these events again with the same "
        "ids"
    )
