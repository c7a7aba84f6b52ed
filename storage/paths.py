"""Where everything of a population lies in its store: docs/format.md as code.

<population>/population.json                        identity, written once
<population>/experience/<partition>/<seq>.arrow     experience log
<population>/floors/<partition>/<floor>             how far that log was cut off
<population>/snapshots/<partition>/<floor>-….arrow  what was kept of it
<population>/revisions/<partition>/<seq>.json       revision log
<population>/packs/<partition>/<epoch>-….safetensors
<population>/checkpoints/<partition>/<seq>.parquet
<population>/owners/<partition>.json                heartbeat of the partition's owner
<population>/controllers/<name>.json, .stop         heartbeat of a controller; a request to stop
<population>/keys/<aa>/<pseudonym>                  wrapped key of a user
<population>/keys/population                        wrapped secrets of the population
<population>/eras/<number>                          erasures so far
<population>/exports/<pseudonym>/<revision>.tar     shared exports
"""

from __future__ import annotations

SECRETS = "population"
"""Name of the secrets' object among the users' keys."""


def identity(population: str) -> str:
    return f"{population}/population.json"


def experience_folder(population: str, partition: int) -> str:
    return f"{population}/experience/{partition}"


def floor_folder(population: str, partition: int) -> str:
    return f"{population}/floors/{partition}"


def snapshot(population: str, partition: int, floor: int, unique: str) -> str:
    """`unique`: so that no two writers share a key."""
    return f"{population}/snapshots/{partition}/{floor:020d}-{unique}.arrow"


def revision_folder(population: str, partition: int) -> str:
    return f"{population}/revisions/{partition}"


def pack_folder(population: str, partition: int) -> str:
    return f"{population}/packs/{partition}"


def pack(population: str, partition: int, epoch: int, name: str, unique: str) -> str:
    """`unique`: a second try of a wave must never write over a pack that a manifest may name."""
    folder = pack_folder(population, partition)
    return f"{folder}/{epoch:020d}-{name}-{unique}.safetensors"


def epoch_of_pack(key: str) -> int:
    """The epoch in which a pack was written."""
    return int(key.rpartition("/")[2].partition("-")[0])


def checkpoint_folder(population: str, partition: int) -> str:
    return f"{population}/checkpoints/{partition}"


def checkpoint(population: str, partition: int, seq: int) -> str:
    return f"{checkpoint_folder(population, partition)}/{seq:020d}.parquet"


def seq_of_checkpoint(key: str) -> int:
    """Number of the record that vouches for a checkpoint."""
    return int(key.rpartition("/")[2].partition(".")[0])


def owner(population: str, partition: int) -> str:
    return f"{population}/owners/{partition}.json"


def controller_folder(population: str) -> str:
    return f"{population}/controllers"


def controller(population: str, name: str) -> str:
    return f"{controller_folder(population)}/{name}.json"


def stop_request(population: str, name: str) -> str:
    """Where somebody asks a controller to stop."""
    return f"{controller_folder(population)}/{name}.stop"


def key_folder(population: str) -> str:
    return f"{population}/keys"


def user_key(population: str, pseudonym: str) -> str:
    return f"{key_folder(population)}/{pseudonym[:2]}/{pseudonym}"


def secrets(population: str) -> str:
    return f"{key_folder(population)}/{SECRETS}"


def era_folder(population: str) -> str:
    return f"{population}/eras"


def export_folder(population: str, pseudonym: str) -> str:
    return f"{population}/exports/{pseudonym}"


def probe_folder(population: str, unique: str) -> str:
    return f"{population}/probe/{unique}"
