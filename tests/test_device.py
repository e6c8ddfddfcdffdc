"""The first line of a training says which device it is on, and why it is not the GPU that is there."""

import os

import pytest
import torch

from perce_lite.config import PerCEConfig, compute_dtype
from perce_lite.device import nvidia_gpus, say_device, warn_of_an_unused_gpu
from perce_lite.errors import DeviceError
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.recipe import Recipe


def recipe(**values) -> Recipe:
    return Recipe.model_validate({"data": {"path": "rows.jsonl"}, **values})


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine whose driver knows these GPUs: puts an `nvidia-smi` that lists them in the path."""

    def with_gpus(*names: str, code: int = 0) -> None:
        file = tmp_path / "nvidia-smi"
        lines = "".join(f"echo '{name}'\n" for name in names)
        file.write_text(f"#!/bin/sh\n{lines}exit {code}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return with_gpus


def test_a_gpu_is_named_with_what_is_free(capsys):
    with imitated(capability=(7, 5)):
        torch_holds = torch.zeros(2**28, device="cuda")
        say_device(recipe())
        del torch_holds
    told = capsys.readouterr().err
    assert told == "Device: imitated GPU of compute capability 7.5, float16, 11.0 of 12.0 GiB free\n"


def test_a_cpu_build_beside_a_gpu_is_told(capsys, driver, monkeypatch):
    driver("NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert nvidia_gpus() == ["NVIDIA GeForce RTX 3060"]
    say_device(recipe())
    told = capsys.readouterr().err
    assert told.startswith("Device: CPU, ")
    assert "NVIDIA GeForce RTX 3060 is in this machine, but torch" in told
    assert "a build without CUDA" in told
    assert "Install one with CUDA" in told
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    warn_of_an_unused_gpu()
    assert "The driver may be too old" in capsys.readouterr().err


def test_nothing_is_told_of_what_is_not_there(capsys, driver, monkeypatch):
    driver("No devices were found", code=6)
    warn_of_an_unused_gpu()
    driver("NVIDIA GeForce RTX 3060")
    say_device(recipe(device="cpu"))
    monkeypatch.setenv("PATH", "")
    warn_of_an_unused_gpu()
    dtype = str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert capsys.readouterr().err.splitlines() == [f"Device: CPU (device: cpu), {dtype}"]


def test_a_device_that_is_asked_for_and_absent_is_refused():
    with pytest.raises(DeviceError):
        say_device(recipe(device="cuda"))


def test_an_apple_gpu_is_refused_by_name(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    say_device(recipe())
    assert "The Apple GPU (MPS) is not used" in capsys.readouterr().err
    args = PerCEConfig(output_dir=str(tmp_path))
    assert "The Apple GPU (MPS) is not used" in capsys.readouterr().err
    assert args.use_cpu
    assert args.device.type == "cpu"
    PerCEConfig(output_dir=str(tmp_path), use_cpu=True)
    assert capsys.readouterr().err == ""
