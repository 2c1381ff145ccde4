"""`lorapro compare`: methods that act beside the optimizer, with any optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from comparison_helpers import CLASSES, CPU, TINY, content, runs_of, settings
from lorapro_hf import LoRAMethod, add_lora_sb, create_lorapro_optimizer, gelora_ranks, init_from_gradients
from lorapro_hf.commands.compare import methods, training
from lorapro_hf.commands.compare.methods import METHODS, method_of
from lorapro_hf.commands.compare.plan import PlannedRun
from lorapro_hf.commands.compare.settings import settings_of
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.options import UsageError

TOKENS = {"gelora": {"pooling": "tokens"}}
LORA_ONE_PRO = {"like": "pro_full_linear", "callbacks": {"GradientStart": {"method": "lora_one", "step_size": 0.1}}}
GELORA_PRO = {"like": "pro_factored_linear", **TOKENS}


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return load_task(settings_of(content()).tasks[0])


def run_of(name: str, entry: dict[str, Any]) -> PlannedRun:
    return runs_of(settings_of(content(methods={name: {**entry, "learning_rates": [1e-2]}})))[0]


def loop(task: LoadedTask, run: PlannedRun) -> list[float]:
    """The losses of a plain loop that calls the library's functions by itself."""
    batches = [task.collate([task.sets["train"][i] for i in step]) for step in task.order(run.seed)]
    model = load_task(task.settings).model.requires_grad_(False)
    ranks: dict[str, Any] = {"r": 2, "lora_alpha": 4.0}
    if "gelora" in run.method.name:
        ranks = gelora_ranks(model, batches, pooling="tokens")
    layers = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and name != "lm_head"]
    torch.manual_seed(run.seed)
    model = get_peft_model(model, LoraConfig(target_modules=layers, **ranks)).train()

    def loss_of(model: Any, batch: Any) -> Any:
        return task.loss_of(model, batch)[0]

    if run.method.name == "lora_one_pro":
        init_from_gradients(model, batches, "lora_one", 0.1, loss_fn=loss_of)
    elif run.method.name == "lora_sb":
        add_lora_sb(model, batches, loss_fn=loss_of)
    if run.method.is_lora_pro:
        optimizer: Any = create_lorapro_optimizer(model, lr=run.learning_rate, config=dict(run.method.settings))
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("cosine", optimizer, 0, 3)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("name", "entry"), [("lora_one_pro", LORA_ONE_PRO), ("lora_sb", {}), ("gelora_pro", GELORA_PRO)]
)
def test_a_run_is_that_of_a_plain_loop(name: str, entry: dict[str, Any], task: LoadedTask, tmp_path: Path) -> None:
    run = run_of(name, entry)
    record = training.train_run(task, run, settings(tmp_path), CPU)
    assert record.status == "finished", record.error
    assert record.losses == loop(task, run)
    if name == "lora_sb":
        assert record.trainable == (record.adapted_layers or 0) * 2**2


def test_chosen_ranks_need_no_labels(tmp_path: Path) -> None:
    """The model of a classification has no loss of its own."""
    more = {"tasks": {"t": CLASSES}, "methods": {"gelora": {**TOKENS, "learning_rates": [1e-2]}}}
    chosen = settings(tmp_path, **more)
    record = training.train_run(load_task(chosen.tasks[0]), runs_of(chosen)[0], chosen, CPU)
    assert record.status == "finished", record.error


class Probe(LoRAMethod):
    """Counts its calls."""

    name = "probe"
    calls: dict[str, int]

    def before_training(self, model: Any, batches: Any) -> None:
        Probe.calls = {"batches": len(list(batches)), "contexts": 0, "steps": 0}

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        Probe.calls["contexts"] += 1
        yield

    def after_step(self, optimizer: Any, step: int) -> None:
        Probe.calls["steps"] += 1


def test_a_method_gets_all_its_calls(task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_lora_methods", lambda: {"Probe": Probe})
    record = training.train_run(task, run_of("lora", {"callbacks": {"Probe": None}}), settings(tmp_path), CPU)
    assert record.status == "finished", record.error
    assert Probe.calls == {"batches": 3, "contexts": 3, "steps": 3} and len(record.losses) == 3


def test_chosen_ranks_are_one_run_for_all_ranks() -> None:
    chosen = content(tasks={"tiny": {**TINY, "ranks": [2, 4]}}, methods={"mine": GELORA_PRO, "lora_one": [1e-2]})
    runs = [run for run in runs_of(settings_of(chosen)) if run.learning_rate == run.method.learning_rates[0]]
    assert [(run.method.name, run.rank) for run in runs] == [("mine", None), ("lora_one", 2), ("lora_one", 4)]


def test_callbacks_and_chosen_ranks_decide_where_they_are_set() -> None:
    assert set(METHODS["lora"].decides()) == {"optimizer", "settings", "adapter", "clips"}
    assert METHODS["lora_one"].decides() == {**METHODS["lora"].decides(), "callbacks": METHODS["lora_one"].callbacks}
    assert METHODS["gelora"].decides() == {**METHODS["lora"].decides(), "gelora": {}}
    variant = method_of("mine", {"like": "lora_one", "callbacks": {"GradientStart": {"samples": 8}}})
    assert variant.callbacks == {"GradientStart": {"method": "lora_one", "samples": 8}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"callbacks": {"LoRASb": {}}}, r"callbacks has 'LoRASb'; choose from .*GradientStart, .*LoRASB"),
        ({"callbacks": {"LoRASB": 3}}, "callbacks.LoRASB=3 must be a mapping"),
        ({"callbacks": {"LoRASB": {"rate": 3}}}, "unexpected keyword argument 'rate'"),
        ({"callbacks": {"LoRASB": {"step_size": "1e-3"}}}, "YAML needs a point in numbers"),
        ({"callbacks": {"LoRASB": {"step_size": -1.0}}}, r"step_size=-1\.0 must be a positive number"),
        ({"like": "pro_full_linear", "callbacks": {"LoRASB": {}}}, "'lora_sb' cannot be combined with lora_pro=True"),
        ({"like": "full", "callbacks": {"LoRASB": {}}}, "has no adapter; leave `callbacks` out"),
        ({"like": "full", "gelora": {}}, "has no adapter; leave `gelora` out"),
        ({"gelora": {"alpha_over_r": 1.0}}, r"gelora has \['alpha_over_r'\]; use blocks, max_points, pooling"),
    ],
)
def test_useless_callbacks_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        method_of("mine", {"like": "lora", **entry})
