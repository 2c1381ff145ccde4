"""LoRAProCallback: adjusted gradients for optimizers that know nothing of LoRA-Pro."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import DistributedType, PartialState
from packaging.version import Version
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.optimization import Adafactor

from grids import rest_slow
from lorapro_hf import (
    LoRAProCallback,
    LoRAProConfig,
    LoRAProOptimizerFactory,
    create_lorapro_optimizer,
    equivalent_gradient,
    find_lora_pairs,
    project_lora_gradients,
)
from trainer_helpers import arguments, assert_same, build, differ, factors, tiny_base, tiny_lora

LR = 1e-2


class Snapshot(TrainerCallback):
    """Keeps the factors and raw gradients of every pair as they are before the optimizer's step."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[torch.Tensor, ...]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for pair in find_lora_pairs(model):
            self.pairs[pair.name] = tuple(t.detach().clone() for t in (pair.A, pair.B, pair.A.grad, pair.B.grad))


def train(folder: Path, callbacks: list, optimizer: Any = None, model: Any = None, **settings: Any) -> Any:
    """Train with the plain Trainer."""
    model = tiny_lora() if model is None else model
    given = {} if optimizer is None else {"optimizers": (optimizer(model), None)}
    trainer = build(Trainer, arguments(folder, **settings), model=model, callbacks=callbacks, **given)
    trainer.train()
    return trainer


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


@pytest.mark.parametrize("x_mode", rest_slow(["sylvester", "zero", "symmetric"]))
@pytest.mark.parametrize("max_grad_norm", rest_slow([0.05, 1e9]))
def test_sgd_moves_the_weight_along_the_projected_gradient(tmp_path: Path, x_mode: str, max_grad_norm: float):
    snapshot = Snapshot()
    callback = LoRAProCallback(LoRAProConfig(mode="efficient", x_mode=x_mode))
    settings = {"max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    trainer = train(tmp_path, [snapshot, callback], sgd, **settings)
    pairs = find_lora_pairs(trainer.model)
    assert len(pairs) == 14
    squares = torch.zeros(())
    for pair in pairs:
        A, B, grad_A, grad_B = snapshot.pairs[pair.name]
        h_A, h_B = project_lora_gradients(A, B, grad_A, grad_B, pair.scaling, x_mode=x_mode)
        realised = pair.scaling * (B @ (pair.A.detach() - A) + (pair.B.detach() - B) @ A)
        expected = -LR * equivalent_gradient(A, B, h_A, h_B, pair.scaling)
        squares += (expected / LR).square().sum()
        assert expected.norm() > 1e-8
        assert (realised - expected).norm() <= 1e-2 * expected.norm()
        assert (pair.A.detach() - (A - LR * h_A)).abs().max() <= 1e-7
        assert (pair.B.detach() - (B - LR * h_B)).abs().max() <= 1e-7
    # the raw gradients were clipped before the callback saw them
    raw = torch.stack([g.norm() for entry in snapshot.pairs.values() for g in entry[2:]]).norm()
    assert (raw <= max_grad_norm * 1.001) and (max_grad_norm > 1 or raw >= max_grad_norm * 0.99)
    torch.testing.assert_close(callback.last_grad_norm, squares.sqrt(), rtol=1e-4, atol=0)


def test_adamw_with_the_callback_is_the_efficient_mode_of_the_paper(tmp_path: Path):
    callback = LoRAProCallback()
    assert callback.last_grad_norm is None
    settings = {"weight_decay": 0.1, "gradient_accumulation_steps": 2}
    with_callback = train(tmp_path / "a", [callback], **settings)
    assert float(callback.last_grad_norm) > 0

    def efficient(model: Any) -> torch.optim.Optimizer:
        config = {"mode": "efficient", "efficient_projected": True}
        return create_lorapro_optimizer(model, lr=LR, weight_decay=0.1, config=config)

    assert_same(factors(with_callback), factors(train(tmp_path / "b", [], efficient, **settings)), rtol=1e-5, atol=1e-6)
    assert differ(factors(with_callback), factors(train(tmp_path / "c", [], **settings)))


def test_other_optimizers_and_a_second_training(tmp_path: Path):
    def adafactor(model: Any) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)

    callback = LoRAProCallback()
    trainer = train(tmp_path / "a", [callback], adafactor, max_steps=2)
    assert differ(factors(trainer), factors(train(tmp_path / "b", [], adafactor, max_steps=2)))
    first, before = callback.last_grad_norm, factors(trainer)
    trainer.train()
    assert differ(before, factors(trainer)) and not torch.equal(first, callback.last_grad_norm)


def test_in_a_loop_without_trainer():
    """The callback's step is `project_pair_gradients_`, which needs no Trainer."""
    from lorapro_hf.optim.projected_gradients import project_pair_gradients_

    model, callback = tiny_lora(), LoRAProCallback()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    norm = project_pair_gradients_(find_lora_pairs(model), callback.config)
    adjusted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.grad = raw.get(name)
    events = (None, TrainerState(), TrainerControl())
    callback.on_train_begin(*events, model=torch.nn.DataParallel(model), optimizer=sgd(model))
    callback.on_pre_optimizer_step(*events, model=model)
    assert_same(adjusted, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(norm, callback.last_grad_norm)


# ---- wrong use ----


def test_full_mode_raises():
    with pytest.raises(
        ValueError, match=r"cannot run mode='full'.*LoRAProConfig\(mode=\"efficient\"\).*LoRAProTrainer"
    ):
        LoRAProCallback(LoRAProConfig(mode="full"))
    with pytest.raises(TypeError, match=r"must be a LoRAProConfig or a dictionary of its settings .* got 'efficient'"):
        LoRAProCallback("efficient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot run update='sequential'.*LoRAProTrainer"):
        LoRAProCallback({"update": "sequential"})
    config = LoRAProConfig(mode="efficient", x_mode="zero", efficient_projected=True)
    assert LoRAProCallback({"x_mode": "zero"}).config == config


def test_callback_and_optimizer_both_active_raises(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"LoRAProAdamW are both active.*Drop the callback"):
        train(tmp_path, [LoRAProCallback()], lambda model: create_lorapro_optimizer(model, lr=LR))


def test_callback_and_factory_both_active_raises(tmp_path: Path):
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 knows no optimizer factories")
    factory = (LoRAProOptimizerFactory, {"lr": LR})
    args = arguments(tmp_path)
    trainer = build(Trainer, args, callbacks=[LoRAProCallback()], optimizer_cls_and_kwargs=factory)
    with pytest.raises(RuntimeError, match="LoRAProAdamW are both active"):
        trainer.train()


def test_two_callbacks_raise(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"Two LoRAProCallbacks.*Keep one"):
        train(tmp_path, [LoRAProCallback(), LoRAProCallback()])


def test_model_without_pairs_raises(tmp_path: Path):
    with pytest.raises(ValueError, match="no LoRA layer; wrap it first"):
        train(tmp_path, [LoRAProCallback()], model=tiny_base())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.DEEPSPEED, "cannot work under DeepSpeed.*attach_deepspeed"),
        (DistributedType.FSDP, "FSDP1.*fsdp_version: 2.*drop LoRAProCallback"),
        (DistributedType.MEGATRON_LM, "MEGATRON_LM.*drop LoRAProCallback"),
    ],
)
def test_engines_that_hide_gradients_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType, message: str
):
    trainer = build(Trainer, arguments(tmp_path))  # sets accelerate's state up
    callback, events = LoRAProCallback(), (None, TrainerState(), TrainerControl())
    with monkeypatch.context() as patch:
        patch.setitem(PartialState._shared_state, "distributed_type", kind)
        with pytest.raises(RuntimeError, match=message):
            callback.on_train_begin(*events, model=trainer.model, optimizer=None)
    callback.on_train_begin(*events, model=trainer.model, optimizer=None)


def test_no_gradient_raises(tmp_path: Path):
    class Eater(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.zero_grad(set_to_none=True)

    with pytest.raises(RuntimeError, match=r"None of the 14 LoRA pairs has a gradient.*no DeepSpeed, or drop"):
        train(tmp_path, [Eater(), LoRAProCallback()])


def test_step_before_the_start_raises():
    with pytest.raises(RuntimeError, match=r"no start of training.*on_train_begin.*project_pair_gradients_"):
        LoRAProCallback().on_pre_optimizer_step(None, TrainerState(), TrainerControl())
