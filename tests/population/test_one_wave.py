"""The example that reads from top to bottom does what it says."""

from __future__ import annotations

from pathlib import Path

from examples.one_wave import main


def test_one_wave_ends_in_a_revision_of_every_user(bases: dict[str, Path]) -> None:
    population = main(str(bases["mixtral"]))
    assert population.users() == ["ada", "bob"]
    assert population.status().pending_events == 0
    chains = {user: population.revisions(user) for user in population.users()}
    assert len(chains["bob"]) == 2, "a demonstration always teaches"
    # All samples of a task may get one reward: then there is no signal, and no revision.
    assert len(chains["ada"]) == 2 or population.status().settled_events == 1
    assert not any(population.verify(user).problems for user in population.users())
