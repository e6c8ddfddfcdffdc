"""Shared by all tests: one thread a process, a worker a core, a cache folder of their own, no model hub."""

import gc
import os
import shutil
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Toys are slower with two threads, and workers that share the cores much slower. Children of the tests inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import toys
import transformers

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.console import quiet
from perce_lite.data.rows import Row

quiet()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.utils.logging.disable_progress_bar()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real text for the tests that need it; they skip where it is absent."""

SMALL_DISK = 48 * 2**20

MAX_WORKERS = 4
"""Each worker needs some 1.5 GB of memory."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `-n auto`: one a core that this process may use; none where tests would share a GPU's memory."""
    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


@pytest.fixture(autouse=True, scope="module")
def modules_frozen() -> None:
    """Modules are no garbage: each full collection, of which a training makes several, took half a second over them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test, or a fixture of a whole file, draws does not depend on which tests ran before it in this worker."""
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def own_home(request, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache folder of its own, save those that use the real model: they share the user's."""
    if "real_model" not in request.fixturenames:
        monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of the built-in model, brought and converted at first use."""
    from perce_lite.model.builtin import built_in_folder

    return built_in_folder("smollm2-135m")


@pytest.fixture
def toy_trainer(tmp_path: Path) -> Callable[..., PerCETrainer]:
    """Makes a trainer over a toy model in float32; keyword arguments go to `PerCEConfig`, those named below not.

    prepared: with its reference log-probs, as `train` would see it
    """
    from peft import LoraConfig

    def make(
        family: str = "chatml",
        rows: list[dict] | list[Row] | None = None,
        lora: dict | None = None,
        model=None,
        prepared: bool = False,
        **config,
    ) -> PerCETrainer:
        tokenizer = toys.toy_tokenizer(family)
        trained = model if model is not None else toys.toy_model(family, len(tokenizer))
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_length": 512,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "clip_min": 0.1,
            "clip_max": 3.0,
        }
        rows = toys.toy_rows() if rows is None else rows
        extra = {key: config.pop(key) for key in ("eval_dataset", "template", "max_profile_tokens") if key in config}
        trainer = PerCETrainer(
            trained,
            PerCEConfig(**{**defaults, **config}),
            train_dataset=rows
            if rows and isinstance(rows[0], Row)
            else datasets.Dataset.from_list(rows or toys.toy_rows()),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                **{"r": 4, "target_modules": "all-linear", "init_lora_weights": True, **(lora or {})}
            ),
            **extra,
        )
        if prepared:
            trainer.prepare()
        return trainer

    return make


@pytest.fixture
def small_disk(tmp_path):
    """A file system of `SMALL_DISK` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "perce-lite-test", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
