"""Flat-LoRA and GGPO in a loop, in trainers, resumed, and on two ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from killable import Nursery
from lora_layers import ROWS, needs_weight_tying, tied_llama
from lorapro_hf import (
    FlatLoRACallback,
    LoRAProCallback,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    equivalent_gradient,
    find_lora_pairs,
    fuse_lora_layers,
    perturbed_weights,
    project_lora_gradients,
)
from lorapro_hf.kernels.noise import NoiseKey, standard_normal
from lorapro_hf.methods import noisy_layers
from trainer_helpers import arguments, assert_same, build, differ, factors, logged, sequences, tiny_lora

ROW = next(row for row in ROWS if row.name == "linear")


def built(**settings: Any) -> Any:
    torch.manual_seed(0)
    return ROW.build(**settings)


def noise_in(context: Any, model: Any) -> torch.Tensor:
    """The noise of the single weight within a context, `(5, 6)`."""
    layer = model.base_model.model.body
    eye = torch.eye(6, dtype=torch.float64)
    plain = layer(eye)
    with context:
        return (layer(eye) - plain).T.detach()


def expected_noise(model: Any, sigma: float, key: tuple[int, int], squares: Any = 0.0) -> torch.Tensor:
    layer = model.base_model.model.body
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    z = standard_normal(torch.arange(5), 6, NoiseKey(key[0], 0, key[1]))
    return (z * sigma / math.sqrt(6) * (weight.square().sum(1) + squares).sqrt()[:, None]).detach()


def after(method: FlatLoRACallback, steps: int) -> FlatLoRACallback:
    method.after_step(None, steps)
    return method


# ---- the noise of each window ----


def test_noise_follows_seed_step_schedule_and_every():
    model = built()
    method = FlatLoRACallback(0.2, schedule="cosine", every=2, seed=11, total_steps=6)
    method.before_training(model, None)
    for step in range(1, 8):
        found = noise_in(method.forward_context(), model)
        factor = (1 - math.cos(math.pi * min(step, 6) / 6)) / 2 if step % 2 == 0 else 0.0
        torch.testing.assert_close(found, expected_noise(model, 0.2 * factor, (11, step)), rtol=1e-5, atol=1e-7)
        assert torch.equal(found, noise_in(method.forward_context(), model))  # of each micro-batch
        with torch.no_grad():
            find_lora_pairs(model)[0].B.mul_(1.5)  # a step
        after(method, step)


def test_the_default_seed_is_torchs_and_drawing_leaves_random_states_alone():
    model = built(lora_dropout=0.3)
    torch.manual_seed(42)
    method = FlatLoRACallback(0.2, schedule="constant")
    method.before_training(model, None)
    assert method.state_dict()["seed"] == 42
    states = []
    for context in (torch.enable_grad(), method.forward_context()):
        torch.manual_seed(3)
        with context:
            model(torch.ones(4, 6).double()).sum().backward()
        states.append((torch.get_rng_state(), torch.rand(3)))
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])


def test_evaluation_disabled_adapters_and_other_adapters_see_no_noise():
    model, x = built(), torch.randn(4, 6).double()
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["body"], init_lora_weights=False))
    model = model.double()
    method = FlatLoRACallback(0.2, schedule="constant")
    method.before_training(model, None)
    noisy = [method.forward_context(), perturbed_weights(model, sigma=0.2, seed=1)]
    for context, in_evaluation in zip(noisy, (False, True), strict=True):
        model.train()
        plain = model(x)
        with context:
            assert not torch.equal(model(x), plain)
            assert (not torch.equal(model.eval()(x), plain)) == in_evaluation
            model.train()
            with torch.no_grad():
                assert (not torch.equal(model(x), plain)) == in_evaluation
            with model.disable_adapter():
                bare = model(x)
            model.set_adapter("frozen")
            other = model(x)
            model.set_adapter("default")
        with model.disable_adapter():
            assert torch.equal(bare, model(x))
        model.set_adapter("frozen")
        assert torch.equal(other, model(x))
        model.set_adapter("default")


def test_an_exception_leaves_nothing_behind():
    model = tiny_lora()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.base_model.model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), perturbed_weights(model, sigma=0.5):
        model(**batch())
    hook.remove()
    assert_same(model.state_dict(), before)
    assert [set(vars(module)) for module in model.modules()] == attributes


def batch(count: int = 2) -> dict[str, torch.Tensor]:
    rows = sequences(count)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_noise(reentrant):
    found = []
    for is_on in (False, True):
        model = tiny_lora().train()
        model.enable_input_require_grads()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        method = FlatLoRACallback(0.5, schedule="constant", seed=1)
        method.before_training(model, None)
        with method.forward_context():
            model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same(*found, rtol=1e-5, atol=1e-7)
    with perturbed_weights(model, sigma=0.5, seed=2):
        model.zero_grad()
        model(**batch()).loss.backward()
    assert differ({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, found[1])


def test_fused_layers_see_the_same_noise():
    found = []
    for is_fused in (False, True):
        model = tiny_lora().train()
        if is_fused:
            assert fuse_lora_layers(model) == 14
        with perturbed_weights(model, sigma=0.5, seed=1):
            model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same(*found, rtol=1e-4, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest new tensor."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.elements = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() != self.known:
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.itemsize)
        return out


def test_memory_is_that_of_one_tile_and_nothing_more_is_saved(monkeypatch):
    monkeypatch.setitem(noisy_layers.TILE_ELEMENTS, "cpu", 256)
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=2, target_modules=["0"]))
    x, weight = torch.randn(3, 64, requires_grad=True), model.base_model.model[0].base_layer.weight
    saved: list[list[int]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[-1].append(tensor.untyped_storage().nbytes())
        return tensor

    for context in (torch.enable_grad(), perturbed_weights(model, sigma=0.5)):
        saved.append([])
        with LargestTensor(weight) as largest, context:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                out = model(x)
            out.sum().backward()
        assert largest.elements <= 256
    assert sorted(saved[0]) == sorted(saved[1])


# ---- the gradient in GGPO ----


@pytest.mark.parametrize("name", ["linear", "Conv2d", "embedding", "experts (in, out)"])
@pytest.mark.parametrize("kind", ["projected", "unprojected"])
def test_row_norms_of_the_gradient_are_those_of_the_dense_one(name, kind):
    row = next(each for each in ROWS if each.name == name)
    torch.manual_seed(0)
    model = row.build()
    method = FlatLoRACallback(0.2, 0.5, gradient=kind, schedule="constant")
    method.before_training(model, None)
    row.loss(model).backward()
    method.before_step(None)
    for pair in find_lora_pairs(model):
        A, grad_A = (pair.matrix_A(x.detach()) for x in (pair.A, pair.A.grad))
        B, grad_B = (pair.matrix_B(x.detach()) for x in (pair.B, pair.B.grad))
        h = (grad_A, grad_B)
        if kind == "projected":
            h = project_lora_gradients(A, B, grad_A, grad_B, pair.scaling)
        dense = equivalent_gradient(A, B, *h, pair.scaling)
        found = method.state_dict()["gradient_norms"][pair.name]
        torch.testing.assert_close(found, dense.square().sum(-1).view_as(found), rtol=1e-8, atol=1e-12)


def test_beta_adds_the_gradient_of_the_step_before():
    model = built()
    flat, ggpo = (FlatLoRACallback(0.2, beta, schedule="constant", seed=11) for beta in (0.0, 2.0))
    for method in (flat, ggpo):
        method.before_training(model, None)
    assert torch.equal(*(noise_in(method.forward_context(), model) for method in (flat, ggpo)))  # the first step
    ROW.loss(model).backward()
    for method in (flat, ggpo):
        method.before_step(None)
        after(method, 1)
    squares = ggpo.state_dict()["gradient_norms"]["base_model.model.body"][0]
    found = noise_in(ggpo.forward_context(), model)
    torch.testing.assert_close(found, expected_noise(model, 0.2, (11, 2), 2.0 * squares), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(noise_in(flat.forward_context(), model), expected_noise(model, 0.2, (11, 2)))
    by_context = noise_in(perturbed_weights(model, sigma=0.2, beta=2.0, seed=11), model)
    torch.testing.assert_close(by_context, expected_noise(model, 0.2, (11, 0), 2.0 * squares), rtol=1e-5, atol=1e-7)

    find_lora_pairs(model)[0].A.grad.fill_(math.nan)  # a step that will be left out
    ggpo.before_step(None)
    assert torch.equal(ggpo.state_dict()["gradient_norms"]["base_model.model.body"][0], squares)


# ---- in trainers ----


def trainer_of(folder: Path, *callbacks: TrainerCallback, cls: type = LoRAProTrainer, **settings: Any) -> Any:
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    defaults = {**steps, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    kind = LoRAProTrainingArguments if cls is LoRAProTrainer else None
    args = arguments(folder, *([kind] if kind else []), **{**defaults, **settings})
    return build(cls, args, model=tiny_lora(lora_dropout=0.1), callbacks=[*callbacks])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A training that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, flat_lora_sigma=0.5, flat_lora_beta=0.1)
    trainer.train()
    return folder, trainer


def test_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path):
    folder, trainer = whole
    resumed = trainer_of(tmp_path, flat_lora_sigma=0.5, flat_lora_beta=0.1)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(factors(resumed), factors(trainer))
    assert logged(resumed, "loss") == logged(trainer, "loss")
    one, other = (each.lora_methods[0].state_dict() for each in (trainer, resumed))
    assert_same(one.pop("gradient_norms"), other.pop("gradient_norms"))
    assert one == other == {"seed": 7, "steps": 4}


def test_frozen_weights_stay_to_the_bit_and_the_noise_acts(whole, tmp_path):
    trainer = whole[1]
    start = tiny_lora(lora_dropout=0.1).state_dict()
    frozen = {name: value for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    assert_same(frozen, {name: start[name] for name in frozen})
    plain = trainer_of(tmp_path, max_steps=1, save_strategy="no")
    noisy = trainer_of(tmp_path, FlatLoRACallback(0.5), max_steps=1, save_strategy="no")
    for each in (plain, noisy):
        each.train()
    assert differ(factors(plain), factors(noisy))
    assert "noise on the weights" in noisy._hyperparameters()
    assert trainer._hyperparameters()["noise on the weights"] == (
        "Flat-LoRA, sigma 0.5, beta 0.1 (projected gradient), cosine schedule"
    )


def test_a_plain_trainer_takes_the_same_steps(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "no", "max_grad_norm": 0.0}
    found = []
    for more in ({"cls": Trainer}, {"lora_pro": False}):
        trainer = trainer_of(tmp_path, FlatLoRACallback(0.5, 0.1), **more, **settings)
        trainer.train()
        found.append(factors(trainer))
    assert_same(*found)


def test_gradients_that_a_callback_has_projected_count_as_they_are(tmp_path):
    settings = {"cls": Trainer, "max_steps": 1, "save_strategy": "no"}
    norms = []
    for callbacks in ([], [LoRAProCallback()]):
        method = FlatLoRACallback(0.5, 0.1)
        trainer_of(tmp_path, method, *callbacks, **settings).train()
        norms.append(method.state_dict()["gradient_norms"])
    assert_same(*norms, rtol=1e-3, atol=1e-8)
    method = FlatLoRACallback(0.5, 0.1, gradient="unprojected")
    with pytest.raises(ValueError, match="LoRAProCallback has projected the gradients before"):
        trainer_of(tmp_path, method, LoRAProCallback(), **settings).train()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_as_one_and_resume_to_the_bit(nursery: Nursery, tmp_path: Path):
    job = {"jobs": "method_jobs", "do": "flat"}
    (alone,) = nursery.finish(tmp_path / "one", **job)
    whole = nursery.finish(tmp_path / "two", ranks=2, **job)
    resumed = nursery.finish(tmp_path / "again", ranks=2, resume=str(tmp_path / "two" / "checkpoint-2"), **job)
    for of_rank in (*whole, *resumed):
        assert_same(of_rank, whole[0])
    assert_same(whole[0], alone, rtol=1e-3, atol=1e-5)


# ---- refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, "sigma=-0.1 must be a finite number, 0 or above"),
        ({"beta": math.inf}, "beta=inf must be a finite number"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"gradient": "full"}, "gradient='full'"),
        ({"every": 0}, "every=0 must be a whole number of steps, at least 1"),
        ({"total_steps": 2.5}, "total_steps=2.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FlatLoRACallback(**settings)


def test_a_cosine_without_a_total_is_refused():
    method = FlatLoRACallback()
    with pytest.raises(RuntimeError, match=r"Call before_training\(model, None\) first"):
        method.forward_context()
    method.before_training(built(), None)
    with pytest.raises(ValueError, match=r'Give total_steps=..., or schedule="constant"'):
        method.forward_context()


def test_beta_is_refused_where_it_has_no_meaning():
    with pytest.raises(ValueError, match=r"body: DoRA scales its gradient by row, .* Set beta=0"):
        FlatLoRACallback(0.1, 0.1).before_training(built(use_dora=True), None)


@needs_weight_tying
def test_shared_factors_have_no_gradient_of_one_weight():
    model = tied_llama()
    with perturbed_weights(model, sigma=0.1):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"it shares its factors with another layer, .* Set beta=0"):
        FlatLoRACallback(0.1, 0.1).before_training(model, None)


def test_a_checkpoint_of_another_seed_or_model_is_refused():
    method, other = FlatLoRACallback(0.1, 0.1, seed=1), FlatLoRACallback(0.1, 0.1, seed=2)
    for each in (method, other):
        each.before_training(built(), None)
    state = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"seed=2, but the checkpoint was written with the seed 1\. Leave"):
        other.load_state_dict(state)
    state["gradient_norms"] = {"base_model.model.body": torch.zeros(1, 9)}
    with pytest.raises(ValueError, match="body: the checkpoint holds row norms of another model"):
        method.load_state_dict(state)


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="flat_lora_beta would be ignored: set flat_lora_sigma, too"):
        LoRAProTrainingArguments(str(tmp_path), flat_lora_beta=0.1)
    with pytest.raises(ValueError, match=r"flat_lora_beta=0\.1 would be ignored: set flat_lora_sigma above 0, or"):
        LoRAProTrainingArguments(str(tmp_path), flat_lora_sigma=0, flat_lora_beta=0.1)
    with pytest.raises(ValueError, match=r"^beta=0\.1 would be ignored: set sigma above 0, or leave it out"):
        FlatLoRACallback(0, 0.1)
    with pytest.raises(ValueError, match=r"flat_lora_sigma=-1\.0 must be a finite number"):
        LoRAProTrainingArguments(str(tmp_path), flat_lora_sigma="-1e0")
    args = arguments(tmp_path, LoRAProTrainingArguments, flat_lora_sigma=0.1)
    with pytest.raises(ValueError, match=r"Trainer does not read flat_lora_sigma=0\.1. Use LoRAProTrainer"):
        build(Trainer, args).train()
    compiled = trainer_of(tmp_path, FlatLoRACallback(), torch_compile=True)
    with pytest.raises(ValueError, match=r"combined with torch_compile=True: .* Set torch_compile=False"):
        compiled.train()
