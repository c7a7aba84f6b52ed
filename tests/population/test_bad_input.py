"""Bad input: one clear error that names the field, the value and the way out, and nothing is
written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from populace.configs.load import load_settings
from populace.configs.schema import BaseSettings, Settings
from populace.population.client import Population
from populace.population.experience.events import Demonstration, Rollback, Task, Trajectory
from populace.storage.errors import InvalidInput
from populace.storage.objects.cloud import MemoryStore
from populace.storage.objects.open import open_store
from populace.workers.base.registry import prepare_base

GOOD = Task(prompt="What is rain?", reward="letters")

BAD_EVENTS = {
    "unknown reward": (Task(prompt="hi", reward="nope"), "reward 'nope' is not registered"),
    "empty prompt": (Task(prompt="", reward="letters"), "prompt is empty"),
    "no messages": (Task(prompt=(), reward="letters"), "prompt has no messages"),
    "strange role": (
        Task(prompt=({"role": "boss", "content": "x"},), reward="letters"),
        "role 'boss'",
    ),
    "message without content": (
        Task(prompt=({"role": "user"},), reward="letters"),
        "exactly role and content",
    ),
    "reward_args not JSON": (
        Task(prompt="hi", reward="letters", reward_args={"f": print}),
        "not JSON",
    ),
    "empty event id": (
        Task(prompt="hi", reward="letters", event_id=""),
        "event_id needs 1 to 256 bytes",
    ),
    "fewer logprobs than tokens": (
        Trajectory(
            prompt="hi", completion="yes", reward=1.0, completion_ids=[5, 6], logprobs=[-1.0]
        ),
        "logprobs has 1 entries for 2 completion_ids",
    ),
    "logprobs without tokens": (
        Trajectory(prompt="hi", completion="yes", reward=1.0, logprobs=[-1.0]),
        "logprobs has 1 entries for 0 completion_ids",
    ),
    "fewer expert ids than tokens": (
        Trajectory(
            prompt="hi", completion="yes", reward=1.0, completion_ids=[5, 6], expert_ids=[[[0, 1]]]
        ),
        "expert_ids has 1 entries for 2 completion_ids",
    ),
    "ragged expert ids": (
        Trajectory(
            prompt="hi",
            completion="y",
            reward=1.0,
            completion_ids=[5, 6],
            expert_ids=[[[0, 1]], [[0]]],
        ),
        "same shape for every token",
    ),
    "positive logprob": (
        Trajectory(prompt="hi", completion="yes", reward=1.0, completion_ids=[5], logprobs=[0.5]),
        "at most 0",
    ),
    "reward that is not a number": (
        Trajectory(prompt="hi", completion="y", reward=float("nan")),
        "finite",
    ),
    "negative revision": (
        Trajectory(prompt="hi", completion="y", reward=1.0, revision=-1),
        "start at 0",
    ),
    "empty completion": (Demonstration(prompt="hi", completion=""), "completion is ''"),
    "a command": (Rollback(to=1), "use Population.rollback"),
    "content that is no text": (
        Task(prompt=({"role": "user", "content": None},), reward="letters"),
        "give a text",
    ),
    "huge reward": (Trajectory(prompt="hi", completion="y", reward=1e308), "give a finite number"),
    "reward that is text": (
        Trajectory(prompt="hi", completion="y", reward="0.5"),
        "reward is '0.5'",
    ),  # type: ignore
    "expert ids that are text": (
        Trajectory(
            prompt="hi", completion="y", reward=1.0, completion_ids=[5], expert_ids=[["ab"]]
        ),  # type: ignore
        "expert_ids must be",
    ),
    "expert ids that are no integers": (
        Trajectory(
            prompt="hi", completion="y", reward=1.0, completion_ids=[5], expert_ids=[[[1.5, 0]]]
        ),  # type: ignore
        "expert_ids must be",
    ),
    "no completion ids": (
        Trajectory(prompt="hi", completion="y", reward=1.0, completion_ids=None),  # type: ignore
        "completion_ids is None; give a list",
    ),
    "event id that is no integer": (
        Task(prompt="hi", reward="letters", event_id=3.5),
        "or an integer",
    ),  # type: ignore
    "negative event id": (Task(prompt="hi", reward="letters", event_id=-1), "counts up from 0"),  # type: ignore
    "reward_args with NaN": (
        Task(prompt="hi", reward="letters", reward_args={"x": float("nan")}),
        "not JSON",
    ),
    "negative token": (
        Trajectory(prompt="hi", completion="y", reward=1.0, completion_ids=[-5]),
        "integers from 0 up",
    ),
    "surrogate": (Task(prompt="\ud800", reward="letters"), "can't be stored"),
    "not an event": ({"prompt": "hi"}, "is not an event"),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_a_bad_event_is_refused_with_everything_sent_beside_it(
    settings: Settings, name: str
) -> None:
    event, message = BAD_EVENTS[name]
    store = MemoryStore()
    population = Population.create(store, settings)
    before = list(store.list(""))
    with pytest.raises(InvalidInput) as error:
        population.enqueue("ada", [GOOD, event])  # type: ignore[list-item]
    assert message in str(error.value)
    assert list(store.list("")) == before


@pytest.mark.parametrize(
    ("user", "message"),
    [("", "non-empty"), ("x" * 257, "257 bytes"), ("é" * 129, "258 bytes"), (7, "non-empty")],
)
def test_a_bad_user_is_refused(settings: Settings, user: str, message: str) -> None:
    store = MemoryStore()
    population = Population.create(store, settings)
    before = list(store.list(""))
    with pytest.raises(InvalidInput, match=message):
        population.enqueue(user, [GOOD])
    assert list(store.list("")) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rnk=4", "unknown setting 'adapter.rnk'; did you mean adapter.rank?"),
        ("nonsense=1", "unknown setting 'nonsense'"),
        ("adapter.rank=much", "adapter.rank"),
        ("adapter.rank=0", "adapter.rank is 0; use a number above zero"),
        (
            "train.backend=cuda",
            "train.backend is 'cuda'; use one of auto, grouped, triton, reference",
        ),
        ("base.device=gpu", "base.device is 'gpu'; use one of auto, cpu, cuda"),
        ("adapter.targets=mlp", "adapter.targets is 'mlp'; use one of both, attention, experts"),
        ("evaluation.heldout_share=1", "use a number in [0, 1)"),
        ("scheduler.slots=3", "scheduler.slots is 3"),
        ("adapter.rank", "has no '='"),
        ("rewards.functions.good=module", "write it as module:function"),
    ],
)
def test_a_bad_setting_is_refused(override: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        load_settings(None, [override])
    assert message in str(error.value)


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no configuration file at"):
        load_settings(tmp_path / "nowhere.yaml")


def make_folder(tmp_path: Path, *files: str, config: str = '{"model_type": "mixtral"}') -> Path:
    for name in files:
        (tmp_path / name).write_text(config if name == "config.json" else "")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ((), "", "no config.json"),
        (("config.json",), '{"model_type": "mixtral"}', "no *.safetensors file"),
        (("config.json", "model.safetensors"), '{"model_type": "llama"}', "is of family 'llama'"),
    ],
)
def test_a_folder_that_is_no_base_is_refused(
    tmp_path: Path, settings: Settings, files: tuple[str, ...], config: str, message: str
) -> None:
    folder = make_folder(tmp_path, *files, config=config)
    with pytest.raises(InvalidInput) as error:
        prepare_base(str(folder), lambda stage: None)
    assert message in str(error.value)
    store = MemoryStore()
    with pytest.raises(InvalidInput):
        Population.create(
            store, dataclasses.replace(settings, base=BaseSettings(model=str(folder)))
        )
    assert list(store.list("")) == []


@pytest.mark.parametrize("url", ["s4://bucket", "", "file://relative/path"])
def test_a_bad_store_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="store is"):
        open_store(url)


def test_opening_what_does_not_exist_says_how_to_create_it(settings: Settings) -> None:
    with pytest.raises(InvalidInput, match="no population 'test'"):
        Population.open(MemoryStore(), settings)


def test_a_population_name_is_a_folder_name(settings: Settings) -> None:
    with pytest.raises(InvalidInput, match="population name"):
        Population.create(MemoryStore(), dataclasses.replace(settings, name="../elsewhere"))


def test_another_base_than_the_populations_own_is_refused(
    settings: Settings, bases: dict[str, Path], start: Callable[..., object]
) -> None:
    store = MemoryStore()
    Population.create(store, settings)
    other = dataclasses.replace(settings, base=BaseSettings(model=str(bases["qwen3_moe"])))
    with pytest.raises(Exception, match="lives on base"):
        Population.create(store, other)
