"""Why a shard can't compute on a GPU: each reason by its own words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from populace.storage.errors import InvalidInput
from populace.workers import cards
from populace.workers.cards import Cards, cards_here, cuda_problem
from populace.workers.device import device_of
from tests.support.pretend import Pretended

H100 = Cards(names=("NVIDIA H100 80GB HBM3",), driver="580.159.04")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a driver says what it has."""
    monkeypatch.setattr(cards, "_DRIVER", tmp_path)
    monkeypatch.setenv("PATH", "")
    return tmp_path


def test_cards_are_those_that_the_driver_names(driver: Path) -> None:
    assert cards_here() == Cards()
    for number in range(2):
        folder = driver / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 0\n")
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
    (driver / "version").write_text(text)
    assert cards_here() == Cards(names=("NVIDIA H200", "NVIDIA H200"), driver="580.159.04")


def test_cards_are_asked_of_nvidia_smi_where_the_driver_shows_no_files(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = driver / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 580.1.2'\necho 'NVIDIA L4, 580.1.2'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(driver))
    assert cards_here() == Cards(names=("NVIDIA L4", "NVIDIA L4"), driver="580.1.2")
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    assert cards_here() == Cards()


def problem(
    monkeypatch: pytest.MonkeyPatch, build: str | None, seen: Cards, error: str | None = None
) -> str:
    """On a machine with these cards, and a torch that finds none."""
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cards, "cards_here", lambda: seen)
    if error is not None:

        def init() -> None:
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(cards.ctypes, "CDLL", lambda name: None)
    return cuda_problem()


def test_a_build_for_cpus_is_told_apart_from_a_machine_without_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert problem(monkeypatch, None, Cards()).startswith("this machine shows no NVIDIA card, and")
    found = problem(monkeypatch, None, H100)
    assert "is a build for CPUs, beside NVIDIA H100" in found and "pip install" in found


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_a_card_that_is_hidden_is_said_to_be(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = problem(monkeypatch, "13.0", H100)
    assert f"CUDA_VISIBLE_DEVICES is {value!r}, which hides NVIDIA H100" in found


def test_a_driver_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "there is no driver (libcuda.so.1); on a machine with a card" in problem(
        monkeypatch, "13.0", Cards()
    )
    assert "docker run --gpus all" in problem(monkeypatch, "13.0", H100)
    old = "The NVIDIA driver on your system is too old (found version 12020)."
    assert old in problem(monkeypatch, "13.0", H100, old)


def test_an_old_card_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pretended(compute_capability=(7, 5)).here():
        assert "has compute capability 7.5, and our kernels need 8.0" in cuda_problem()
    monkeypatch.delenv("CC", raising=False)
    with Pretended().here():
        assert cuda_problem() == ""
        monkeypatch.setenv("PATH", "")
        assert "no C compiler is on the PATH" in cuda_problem()
        assert device_of("auto", "auto").kind == "cpu"
        with pytest.raises(InvalidInput, match=r"base.device is 'cuda', but no C compiler .*=cpu"):
            device_of("cuda", "auto")
        monkeypatch.setenv("CC", "/nonexistent/cc -m64")
        assert "no C compiler" in cuda_problem()
