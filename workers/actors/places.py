"""What shard groups hold of a Ray cluster: named actors, and placement groups of the same names.

A group of `controller` has the prefix `<population>-<store's digest>/<controller>/shard-`.
"""

from __future__ import annotations

import contextlib
import re
from hashlib import sha256

import ray
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

NAMESPACE = "populace"


def prefix_of(population: str, store_url: str, controller: str) -> str:
    """How the names of a group's actors begin; its placement group's whole name."""
    place = sha256(store_url.encode()).hexdigest()[:8]
    return f"{population}-{place}/{controller}/shard-"


def actors_of(prefix: str) -> dict[str, ActorHandle]:
    """A group's living actors by name."""
    names = ray.util.list_named_actors(all_namespaces=True)
    own = [item["name"] for item in names if item["namespace"] == NAMESPACE]
    found: dict[str, ActorHandle] = {}
    for name in own:
        if name.startswith(prefix):
            with contextlib.suppress(ValueError):  # it died since it was listed
                found[name] = ray.get_actor(name, namespace=NAMESPACE)
    return found


def remove_group(prefix: str) -> None:
    """Kill a group's actors and give its places back."""
    for actor in actors_of(prefix).values():
        ray.kill(actor)
    remove_places(prefix)


def remove_places(prefix: str) -> None:
    """Give a group's places back."""
    for name, places in _placement_groups():
        if name == prefix:
            remove_placement_group(places)


def groups_of_replicas(prefix: str) -> set[str]:
    """Prefixes of the groups that the other controllers of `prefix`'s run have in the cluster, or
    those of a run of that name that died have left there: `main.1` is one of `main`."""
    stem = re.escape(prefix.removesuffix("/shard-"))
    pattern = re.compile(rf"({stem}\.\d+/shard-)\d*")
    names = [name for name, _ in _placement_groups()]
    names += [item["name"] for item in ray.util.list_named_actors(all_namespaces=True)]
    return {found[1] for name in names if (found := pattern.fullmatch(name))}


def free_for(prefix: str, resource: str) -> float:
    """How much of `GPU` or `CPU` nobody in the cluster uses, or a run of this name has left
    reserved."""
    own = {prefix, *groups_of_replicas(prefix)}
    held = sum(
        bundle.get(resource, 0.0)
        for item in placement_group_table().values()
        if item["state"] == "CREATED" and item["name"] in own
        for bundle in item["bundles"].values()
    )
    free: float = ray.available_resources().get(resource, 0.0)
    return free + float(held)


def _placement_groups() -> list[tuple[str, PlacementGroup]]:
    """Names and handles of those that are not removed, in all namespaces."""
    return [
        (item["name"], PlacementGroup(PlacementGroupID.from_hex(identity)))
        for identity, item in placement_group_table().items()
        if item["state"] != "REMOVED"
    ]
