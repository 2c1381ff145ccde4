"""Settings that hold for every test; the environment is set before any library reads it."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

# No test reaches a network, and none reads or writes the user's caches.
_cache = tempfile.TemporaryDirectory(prefix="lorapro-tests-")
os.environ.update(
    HF_HOME=_cache.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="FALSE",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

import killable  # noqa: E402

# What the test files import stays: to look through it for garbage costs an eighth of the time of importing.
gc.disable()

settings.register_profile(
    "lorapro",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lorapro")


_loaded = [0]  # how many modules there were when objects were set apart


def set_apart() -> None:
    """Leave all objects out of garbage collections to come.

    A Trainer collects garbage at the end of each training, which takes half a second among a million objects.
    """
    gc.collect()
    gc.freeze()
    _loaded.append(len(sys.modules))


def pytest_collection_finish() -> None:
    import torch

    # The tests' tensors are so small that handing them to a second thread costs more than it saves.
    torch.set_num_threads(1)
    set_apart()
    gc.enable()
    killable.nursery()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries complain when they are left over


@pytest.fixture(scope="session")
def nursery() -> killable.Nursery:
    return killable.nursery()


@pytest.fixture(scope="module", autouse=True)
def _other_files() -> None:
    """Set apart what the tests of other files have imported."""
    set_apart()


@pytest.fixture(autouse=True)
def _other_tests() -> None:
    """And what those of this file have, if it is much."""
    if len(sys.modules) > _loaded[-1] + 100:
        set_apart()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def torch_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run in torch, as on other devices than the CPU and without a C++ compiler."""
    from lorapro_hf.kernels import native

    monkeypatch.setattr(native, "native_kernels", lambda: None)


@pytest.fixture(autouse=True)
def _precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of transformers 4 leave their precision in the environment, for all trainings that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
