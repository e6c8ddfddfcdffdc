"""Which device a command computes on, said in its first line, and why it is the CPU where a GPU is in the machine."""

import shutil
import subprocess

import torch

from perce_lite.config import NO_MPS, chosen_dtype, pick_device
from perce_lite.console import say, warn
from perce_lite.recipe import Recipe

_GIB = 2**30


def say_device(recipe: Recipe) -> None:
    """Says which device the recipe trains on, and warns where that is the CPU though an NVIDIA GPU is there.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    device = pick_device(recipe.device)
    dtype = str(chosen_dtype(recipe.dtype, device)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = (size / _GIB for size in torch.cuda.mem_get_info())
        name = torch.cuda.get_device_name(device)
        say(f"Device: {name}, {dtype}, {free:.1f} of {total:.1f} GiB free")
        return
    asked = " (device: cpu)" if recipe.device == "cpu" else ""
    say(f"Device: CPU{asked}, {dtype}")
    if not asked and torch.backends.mps.is_available():
        say(NO_MPS)
    elif not asked:
        warn_of_an_unused_gpu()


def warn_of_an_unused_gpu() -> None:
    """Warns where an NVIDIA GPU is in this machine that torch cannot use; says how to mend it."""
    names = [] if torch.cuda.is_available() else nvidia_gpus()
    if not names:
        return
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build without CUDA"
        mend = "Install one with CUDA for your driver: the selector on pytorch.org/get-started gives the command."
    else:
        why = f"torch {torch.__version__} was built for CUDA {torch.version.cuda} and sees no device"
        mend = (
            "The driver may be too old for that (nvidia-smi shows the newest CUDA that it takes), or "
            "CUDA_VISIBLE_DEVICES may hide it."
        )
    warn(f"{', '.join(names)} is in this machine, but {why}: everything runs on the CPU, many times slower. {mend}")


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver knows; none where there is no driver, or it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        query = [command, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
