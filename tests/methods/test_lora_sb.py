"""LoRA-SB trains R alone between fixed factors, and every save of it is plain LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from lora_layers import ALL_ROWS
from lorapro_hf import (
    GradientStart,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    LoRASB,
    add_lora_sb,
    find_lora_pairs,
    fold_lora_sb,
)
from lorapro_hf.methods.lora_sb import lora_sb_layers
from trainer_helpers import arguments, assert_same, build, differ, sequences, tiny_base
from weight_oracle import of_autograd

ROWS = {row.name: row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)}
IN_DEFAULT_RUN = ("linear with rsLoRA", "Conv1D of GPT-2", "Conv2d", "experts (in, out)")
SLOW = ("linear", "Conv1d", "experts (out, in)", "two expert parameters of one module", "a block used twice")
LAYERS = [*IN_DEFAULT_RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name in ROWS)]


def fresh(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return ROWS[name].build(init_lora_weights=True, **settings)


def loss_with(name: str) -> Any:
    return lambda model, _: ROWS[name].loss(model)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_weight_is_the_truncated_step_and_only_r_moves(name):
    row, model = ROWS[name], fresh(name)
    pairs = find_lora_pairs(model)
    expected = {}
    for pair in pairs if name != "a block used twice" else ():
        step = -1e-3 * of_autograd(model, row.loss)[pair.name].sign()
        U, S, Vt = torch.linalg.svd(step, full_matrices=False)
        expected[pair.name] = U[..., :3] * S[..., None, :3] @ Vt[..., :3, :]
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    add_lora_sb(model, [0], 1e-3, loss_fn=loss_with(name))
    for pair in pairs:
        A, B = pair.matrix_A(pair.A.detach()), pair.matrix_B(pair.B.detach())
        if pair.name in expected:
            torch.testing.assert_close(pair.scaling * B @ A, expected[pair.name], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(A @ A.mT, torch.eye(3).to(A).expand_as(A @ A.mT), rtol=0, atol=1e-10)
    start = trained(model)
    assert [value.shape[-2:] for value in start.values()] == [(3, 3)] * len(pairs)
    fixed = {n: value.clone() for n, value in model.named_buffers()}
    model.set_adapter("default")  # PEFT makes every parameter of the adapter trainable
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    assert len(optimizer.param_groups[0]["params"]) == len(start)
    row.loss(model).backward()
    optimizer.step()
    assert_same(dict(model.named_buffers()), fixed)
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in base.items())
    after = row.output(model)
    assert differ(trained(model), start)

    core, saved = trained(model), plain_tensors(model)
    fold_lora_sb(model)
    assert_same(plain_tensors(model), saved)
    torch.testing.assert_close(row.output(model), after, rtol=1e-12, atol=1e-14)
    assert [pair.name for pair in find_lora_pairs(model)] == [pair.name for pair in pairs]
    assert_same(dict(zip(core, optimizer.param_groups[0]["params"], strict=True)), core)
    plain = fresh(name)
    assert set(plain_tensors(plain)) == set(saved)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(row.output(plain), after, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits):
    name = f"{bits}-bit base"
    model = fresh(name)
    add_lora_sb(model, [0], 1e-3, loss_fn=loss_with(name))
    before = ROWS[name].output(model)
    assert len(trained(model)) == 1
    fold_lora_sb(model)
    torch.testing.assert_close(ROWS[name].output(model), before)


def test_the_gradient_of_r_is_that_of_the_weight_between_the_factors():
    model, row = fresh("linear"), ROWS["linear"]
    add_lora_sb(model, [0], 1e-3, loss_fn=loss_with("linear"))
    folded = copy.deepcopy(model)
    fold_lora_sb(folded)
    (gradient,) = of_autograd(folded, row.loss).values()
    row.loss(model).backward()
    (layer, _), *_ = lora_sb_layers(model).values()
    of_B = layer.lora_B["default"].parametrizations["weight"]
    A, scaling = layer.lora_A["default"].weight, layer.scaling["default"]
    torch.testing.assert_close(of_B.original.grad, scaling * of_B[0].U.T @ gradient @ A.T, rtol=1e-10, atol=1e-12)


def test_merging_and_loading_its_own_state():
    model, row = fresh("linear"), ROWS["linear"]
    add_lora_sb(model, [0], 1e-3, loss_fn=loss_with("linear"))
    state, out = {name: value.clone() for name, value in model.state_dict().items()}, row.output(model)
    model.merge_adapter()
    torch.testing.assert_close(row.output(model), out)
    model.unmerge_adapter()
    for value in (p for p in model.parameters() if p.requires_grad):
        value.data.mul_(3)
    model.load_state_dict(state)
    torch.testing.assert_close(row.output(model), out, rtol=1e-10, atol=1e-12)
    state["base_model.model.body.lora_B.default.weight"] = torch.randn(5, 3).double()
    with pytest.raises(ValueError, match=r"lora_B\.default\.weight is no multiple of the fixed factor .* plain LoRA"):
        model.load_state_dict(state)


def test_a_refused_state_loads_nothing():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    add_lora_sb(model, [torch.randn(3, 4)], loss_fn=lambda model, batch: model(batch).square().sum())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: 2 * value for name, value in before.items()}
    state["base_model.model.1.lora_B.default.weight"] = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"model\.1\.lora_B\.default\.weight is no multiple"):
        nn.ModuleList([model]).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert_same(dict(model.state_dict()), before)


def test_folding_leaves_no_hook_and_a_method_does_not_pass_over_the_plain_model():
    model, method = fresh("linear"), LoRASB(1, 1e-3, loss_with("linear"))
    method.before_training(model, [0])
    copied = copy.deepcopy(model)
    for each in (model, copied):
        fold_lora_sb(each)
        module = each.base_model.model.body.lora_B["default"]
        assert type(module) is nn.Linear and not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks and not each._load_state_dict_pre_hooks
    with pytest.raises(ValueError, match=r"already changes the weight .* which would be lost"):
        method.before_training(model, [0])


def test_a_resumed_model_takes_a_start_that_differs_from_its_own():
    trained_one, resumed = fresh("linear"), fresh("linear")
    add_lora_sb(trained_one, [0], 1e-3, loss_fn=loss_with("linear"))
    add_lora_sb(resumed, [0], 1e-3, loss_fn=lambda model, _: model(torch.ones(2, 6).double()).square().sum())
    before, after = LoRASB(), LoRASB()
    before.before_training(trained_one, [])
    after.before_training(resumed, None)
    resumed.load_state_dict(trained_one.state_dict())
    after.load_state_dict(before.state_dict())
    assert_same(trained(resumed), trained(trained_one))
    assert_same(dict(resumed.named_buffers()), dict(trained_one.named_buffers()))


def test_refusals_change_nothing():
    wrapped = nn.parallel.DistributedDataParallel
    with pytest.raises(ValueError, match=r"Call add_lora_sb\(model.module, batches\), and wrap the model afterwards"):
        add_lora_sb(wrapped.__new__(wrapped), [0])
    with pytest.raises(ValueError, match=r"the model has no LoRA-SB layer. Call add_lora_sb"):
        fold_lora_sb(fresh("linear"))
    embedding = fresh("embedding")
    with pytest.raises(ValueError, match=r"body is an embedding, so that LoRA-SB cannot .* Leave it out of target_mod"):
        add_lora_sb(embedding, [0], loss_fn=loss_with("embedding"))
    model = fresh("linear")
    before = plain_tensors(model)
    with pytest.raises(RuntimeError, match="body: its gradient is not finite"):
        add_lora_sb(model, [0], loss_fn=lambda model, _: float("nan") * ROWS["linear"].loss(model))
    assert_same(plain_tensors(model), before)
    add_lora_sb(model, [0], loss_fn=loss_with("linear"))
    with pytest.raises(ValueError, match="lora_A of adapter 'default' is frozen and the other factor is not"):
        find_lora_pairs(model)


# ---- in a trainer ----


def fresh_llama() -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    return get_peft_model(tiny_base(), config)


def trainer_of(folder: Path, model: Any = None, callbacks: Any = None, **settings: Any) -> Any:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_pro": False, **settings}
    args = arguments(folder, LoRAProTrainingArguments, **settings)
    callbacks = [LoRASB(8, 1e-3)] if callbacks is None else callbacks
    return build(LoRAProTrainer, args, model=model or fresh_llama(), callbacks=callbacks)


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=sequences(1)[0]["input_ids"][None]).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A training that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, trainer


def test_every_save_is_plain_lora(whole, tmp_path):
    folder, trainer = whole
    trainer.save_model(str(tmp_path / "by_trainer"))
    trainer.model.save_pretrained(tmp_path / "by_peft")
    expected = output(trainer.model)
    for saved in (tmp_path / "by_trainer", tmp_path / "by_peft", folder / "checkpoint-4"):
        loaded = PeftModel.from_pretrained(tiny_base(), saved)
        torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-6)
    assert len(trained(trainer.model)) == 14 and len(lora_sb_layers(trainer.model)) == 14


def test_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path):
    folder, trainer = whole
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(trainer.model))
    assert_same(dict(resumed.model.named_buffers()), dict(trainer.model.named_buffers()))


def test_a_model_that_could_not_be_resumed_gets_its_matrices(whole, tmp_path, monkeypatch):
    again = trainer_of(tmp_path, save_strategy="no")
    with monkeypatch.context() as broken:
        broken.setattr(again, "_load_from_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))
    again.train()
    assert_same(trained(again.model), trained(whole[1].model))


@pytest.mark.slow
def test_a_model_that_has_its_matrices_already(tmp_path):
    def model() -> Any:
        made = fresh_llama()
        rows = sequences(8)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        add_lora_sb(made, [batch], 1e-3)
        return made

    trainer = trainer_of(tmp_path, model(), [])
    start = trained(trainer.model)
    trainer.train()
    assert differ(trained(trainer.model), start)
    resumed = trainer_of(tmp_path, model(), [])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(trainer.model))


@pytest.mark.slow
def test_the_best_model_has_its_matrices(tmp_path):
    scores = iter([0.1, 1.0])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = trainer_of(tmp_path, metric_for_best_model="score", **settings)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    saved = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(output(trainer.model), output(saved), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [{"lora_pro": False}, {"lora_pro_init": "lora_one", "lora_pro_init_samples": 8, "lora_pro_mode": "full"}],
)
def test_two_ranks_train_as_one_and_resume_to_the_bit(tmp_path, nursery, settings):
    job = {"jobs": "method_jobs", "do": "start", "settings": {**settings, "learning_rate": 1e-4}}
    (alone,) = nursery.finish(tmp_path / "one", **job)
    whole = nursery.finish(tmp_path / "two", ranks=2, **job)
    resumed = nursery.finish(tmp_path / "again", ranks=2, resume=str(tmp_path / "two" / "checkpoint-2"), **job)
    for of_rank in (*whole, *resumed):
        assert_same(of_rank, whole[0])
    for name, B in alone.items():
        if "lora_B" in name:
            A = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(whole[0][name] @ whole[0][A], B @ alone[A], rtol=2e-2, atol=2e-5)


def test_the_flag_trains_as_the_callback_does(whole, tmp_path):
    settings = {"lora_pro_init": "lora_sb_fixed", "lora_pro_init_samples": 8, "lora_pro_init_step_size": 1e-3}
    trainer = trainer_of(tmp_path, callbacks=[], **settings)
    trainer.train()
    assert_same(trainer.model.state_dict(), whole[1].model.state_dict())


def test_what_cannot_be_combined_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"lora_pro_init='lora_sb_fixed': .* Set lora_pro=False"):
        trainer_of(tmp_path, callbacks=[], lora_pro=True, lora_pro_init="lora_sb_fixed")
    with pytest.raises(ValueError, match="'lora_sb' was given twice"):
        trainer_of(tmp_path, lora_pro_init="lora_sb_fixed").train()
    with pytest.raises(ValueError, match=r"'lora_sb' cannot be combined with lora_pro=True: .* Set lora_pro=False"):
        trainer_of(tmp_path, lora_pro=True).train()
    with pytest.raises(ValueError, match="combined with gradient_start: LoRA-SB has a start of its own"):
        trainer_of(tmp_path, callbacks=[GradientStart(), LoRASB()]).train()
    with pytest.raises(ValueError, match=r"a plain Trainer builds its optimizer before .* Use LoRAProTrainer"):
        build(Trainer, arguments(tmp_path), model=fresh_llama(), callbacks=[LoRASB()]).train()
    other = LoRASB()
    other.before_training(fresh_llama(), None)
    state = whole[1].lora_methods[0].state_dict()
    (first, *_) = state
    with pytest.raises(ValueError, match="holds a LoRA-SB layer of another shape, or none"):
        other.load_state_dict({name: value for name, value in state.items() if name != first})
