"""The capacity planner against figures worked out by hand, and its command."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

import pytest

from populace.population.tools.capacity import Plan, plan, readable
from populace.population.tools.devices import Request
from populace.storage.errors import InvalidInput
from populace.workers.base.families import dims_of_config
from populace.workers.base.footprint import config_of, tensors_of
from populace.workers.shapes import BaseDims

REQUEST = Request(
    device="h100", devices=8, users=1e6, updates_per_user_and_day=1.0, rank=8, expert_rank=1,
    targets="both",
    events_per_update=4,
    samples_per_event=8, prompt_tokens=256, completion_tokens=256, slots=64, kept_revisions=8,
    efficiency=0.4,
    store_bandwidth=10e9, partitions=64,
)  # fmt: skip


@functools.cache
def shapes_of(base: str) -> tuple[BaseDims, dict[str, int]]:
    config = config_of(base)
    return dims_of_config(config), tensors_of(config)


def plan_for(base: str, **changes: object) -> Plan:
    return plan(*shapes_of(base), dataclasses.replace(REQUEST, **changes))


def test_the_figures_of_qwen3_30b_are_those_worked_out_by_hand() -> None:
    found = plan_for("qwen3-30b-a3b")
    hidden, layers, experts, inner = 2048, 48, 128, 768
    attention = (hidden + 4096) + 2 * (hidden + 512) + (4096 + hidden)
    dense = layers * 8 * attention
    expert = layers * 3 * (hidden + inner)
    assert found.value("parameters of an adapter") == dense + experts * expert
    tokens = 4 * (256 + 8 * 256)
    assert found.value("tokens per update") == tokens
    assert found.value("weights of a revision (fp32)") == pytest.approx(
        4 * (dense + experts * expert), rel=1e-9
    )
    assert found.value("evidence of a revision") == 4 * 8 * (256 + 256) * (12 + 2 * layers * 8)
    assert found.value("experts of the base (bf16)") == 2 * layers * 16 * 3 * hidden * inner
    # Exact ranks: every device has its share of the dense parts, and all of 16 experts.
    slot = 4 * (dense / 8 + 16 * expert)
    assert found.value("weights of slots") == 64 * slot
    assert found.value("moments of slots") == 2 * 64 * slot
    assert found.value("gradients") == 32 * slot
    assert found.value("KV cache of one user's rollouts") == 32 * 512 * 2 * layers * 1024
    assert (
        found.value("bytes on the wire per layer and row, there and back")
        == 2 * 8 * hidden * 2 * 7 / 8
    )
    assert found.value("GET requests per year (all adapters cold)") == 2 * 1e6 * 365.25
    assert found.fits


def test_adapters_cost_what_their_targets_and_exact_ranks_have() -> None:
    both, attention, experts = (
        plan_for("qwen3-30b-a3b", devices=1, slots=8, targets=targets)
        for targets in ("both", "attention", "experts")
    )
    # Of rank 8 on attention and 1 on every expert: 0.94 GB a slot with gradient and moments; a slab
    # that stored rank 1 as 8 took 6.75.
    assert 4 * both.value("weights of slots") / 8 == pytest.approx(0.94e9, rel=0.01)
    assert 4 * attention.value("weights of slots") / 8 == pytest.approx(0.107e9, rel=0.01)
    for name in ("weights of slots", "parameters of an adapter"):
        assert both.value(name) == attention.value(name) + experts.value(name)
    assert attention.value("experts that an update reaches") == 0


def test_a_cpu_is_a_device_in_fp32() -> None:
    found = plan_for("qwen3-30b-a3b", device="cpu", devices=8, slots=8)
    assert found.value("experts of the base (fp32)") == pytest.approx(28.99e9 * 4 / 8, rel=0.01)


def test_active_parameters_are_those_that_the_bases_are_known_for() -> None:
    assert plan_for("qwen3-30b-a3b").value("active parameters per token") == pytest.approx(
        3.35e9, rel=0.02
    )
    assert plan_for("deepseek-v3", devices=64).value(
        "active parameters per token"
    ) == pytest.approx(37.5e9, rel=0.02)
    assert plan_for("kimi-k2", devices=64).value("active parameters per token") == pytest.approx(
        32.9e9, rel=0.02
    )


def test_more_devices_of_a_node_hold_more_and_refresh_everybody_sooner() -> None:
    few, many = (
        plan_for("qwen3-30b-a3b", devices=n, slots=8 * n, store_bandwidth=1e12) for n in (4, 8)
    )
    hours = "hours to refresh every user"
    for room in ("free for activations", "free for KV cache"):
        assert few.value(room) < many.value(room)
    assert few.value(hours) > many.value(hours)
    across = plan_for("qwen3-30b-a3b", devices=16, slots=128, store_bandwidth=1e12)
    assert across.bottleneck == "training: exchange", "nodes are joined by thinner wires"


def test_what_does_not_fit_says_so_and_what_to_change() -> None:
    base = plan_for("kimi-k2", devices=8)
    assert (
        not base.fits and base.bottleneck == "the base does not fit" and "more devices" in base.knob
    )
    slab = plan_for("kimi-k2", devices=64, slots=256)
    assert (
        not slab.fits
        and slab.bottleneck.startswith("no room for a wave")
        and "fewer slots" in slab.knob
    )
    assert plan_for("kimi-k2", devices=128, slots=32, samples_per_event=2).fits


@pytest.mark.parametrize(
    ("changes", "problem", "knob"),
    [
        ({"slots": 1}, "it is half of the slots", "two slots"),
        ({"completion_tokens": 10**8}, "no room for one user's rollouts", "fewer samples"),
        ({"slots": 10**6}, "no room for a wave (base and slots", "fewer slots"),
    ],
)
def test_the_advice_is_about_what_is_in_the_way(
    changes: dict[str, object], problem: str, knob: str
) -> None:
    found = plan_for("qwen3-30b-a3b", **changes)
    assert not found.fits and problem in found.bottleneck and knob in found.knob


def test_a_rank_that_is_not_used_may_be_anything() -> None:
    assert plan_for("qwen3-30b-a3b", targets="attention", expert_rank=0).fits
    assert plan_for("qwen3-30b-a3b", targets="experts", rank=0).fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "abacus"}, "device is 'abacus'; use one of cpu, a100"),
        ({"targets": "mlp"}, "targets is 'mlp'; use one of both, attention, experts"),
        ({"users": -1.0}, "users is -1.0; use a number above zero"),
        ({"efficiency": 2.0}, "efficiency is 2.0; use a share of at most 1"),
        ({"devices": 1000}, "devices is 1000; this base has 128 experts, use 1 to 128"),
    ],
)
def test_bad_input_names_the_field_the_value_and_the_way_out(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan_for("qwen3-30b-a3b", **changes)


def test_the_command_prints_a_table_and_writes_json() -> None:
    command = [
        sys.executable,
        "-c",
        "from populace.population.cli.app import main; main()",
        "plan",
    ]
    command += ["--base", "qwen3-30b-a3b", "--users", "1e6"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (
        "hours to refresh every user" in table
        and "bottleneck:" in table
        and "data sheet" not in table
    )
    body = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert {line["source"] for line in body["lines"]} == {"derived", "given", "sheet", "assumed"}
    wrong = subprocess.run([*command, "--device", "abacus"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "device is 'abacus'" in wrong.stderr


def test_values_are_readable() -> None:
    assert readable(2.67e9, "B") == "2.67 GB"
    assert readable(9216, "tokens") == "9.22 k tokens"
    assert readable(0.25, "s") == "0.25 s"
    assert readable(float("inf"), "h") == "-"
