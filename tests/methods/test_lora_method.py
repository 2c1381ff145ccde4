"""A method of one's own in a loop, in any `Trainer`, on two ranks, and resumed to the bit."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from peft import PeftModel
from transformers import Trainer, TrainerCallback, default_data_collator

from killable import Nursery
from lorapro_hf import FlatLoRACallback, LoRAProTrainer, create_lorapro_optimizer
from lorapro_hf.checkpoints.manifest import MANIFEST, read_manifest
from lorapro_hf.checkpoints.method_states import write_method_state
from lorapro_hf.methods import LoRAMethod, require_compatible
from lorapro_hf.methods.base import start
from method_jobs import NoisyAverage, trainer_of
from trainer_helpers import arguments, assert_same, build, differ, factors, logged, tiny_base, tiny_lora

FILE = "lora_method_noisy_average.pt"


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The factors that stock PEFT loads from a folder."""
    model = PeftModel.from_pretrained(tiny_base(), folder)
    return {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}


def averaged(method: NoisyAverage) -> dict[str, torch.Tensor]:
    """The method's average by the names of the parameters."""
    return {f"{name[:-2]}.lora_{name[-1]}.default.weight": value for name, value in method.average.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, NoisyAverage]:
    """A training that was not interrupted: its folder, trainer and method."""
    folder, method = tmp_path_factory.mktemp("whole"), NoisyAverage()
    trainer = trainer_of(folder, method)
    trainer.train()
    return folder, trainer, method


class Recorder(TrainerCallback):
    """Keeps the factors after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("cls", [LoRAProTrainer, Trainer])
def test_a_loop_by_hand_takes_the_steps_of_a_trainer(tmp_path: Path, cls: type[Trainer]):
    batches: list[Any] = []

    def collate(rows: list[Any]) -> Any:
        batches.append(default_data_collator(rows))
        # No model predicts the first token, but transformers 4 counts its label when it takes the mean.
        batches[-1]["labels"][:, 0] = -100
        return batches[-1]

    settings = {"max_steps": 3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    by_trainer, recorder = NoisyAverage(), Recorder()
    args = arguments(tmp_path, **settings)
    more = {"lora_pro_config": {}} if cls is LoRAProTrainer else {}
    trainer = build(cls, args, callbacks=[by_trainer, recorder], data_collator=collate, **more)
    trainer.train()

    model, by_hand = tiny_lora().train(), NoisyAverage()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={}, weight_decay=0.0)
    if cls is Trainer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    by_hand.before_training(model, batches)
    for step, batch in enumerate(batches[2:5], start=1):  # the method has seen one, and accelerate reads one ahead
        with by_hand.forward_context():
            model(**batch).loss.backward()
        by_hand.before_step(optimizer)
        optimizer.step()
        by_hand.after_step(optimizer, step)
        optimizer.zero_grad()
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert_same(factors(trainer), own, rtol=1e-5, atol=1e-6)
    assert_same(averaged(by_trainer), averaged(by_hand), rtol=1e-5, atol=1e-6)
    assert by_trainer.calls == by_hand.calls == [4, (1, False), (2, False), (3, False)]
    expected = recorder.seen[0]
    for seen in recorder.seen[1:]:
        expected = {name: 0.5 * value + 0.5 * seen[name] for name, value in expected.items()}
    assert_same(averaged(by_trainer), expected, rtol=1e-6, atol=1e-7)


def test_the_method_acts_and_leaves_the_order_of_the_data(whole: Any, tmp_path: Path):
    class Still(NoisyAverage):
        forward_context = LoRAMethod.forward_context

    still = trainer_of(tmp_path / "a", Still(), max_steps=2)
    still.train()
    plain = trainer_of(tmp_path / "b", max_steps=2)
    plain.train()
    assert_same(factors(still), factors(plain))  # although it has looked at a batch
    assert differ(factors(whole[1]), factors(plain))


def test_a_start_restores_the_random_state_of_the_devices_in_use_alone(monkeypatch: pytest.MonkeyPatch):
    class Drawing(LoRAMethod):
        name = "drawing"

        def before_training(self, model, batches) -> None:
            torch.rand(3)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    model, before = torch.nn.Linear(2, 2), torch.get_rng_state()
    start([Drawing()], model, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_resumed_equals_uninterrupted_to_the_bit(whole: Any, tmp_path: Path):
    folder, trainer, method = whole
    again = NoisyAverage()
    resumed = trainer_of(tmp_path, again)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(factors(resumed), factors(trainer))
    assert_same(again.average, method.average)
    assert torch.equal(again.generator.get_state(), method.generator.get_state())
    assert logged(resumed, "loss") == logged(trainer, "loss")
    assert method.calls == [2, *((step, False) for step in (1, 2, 3, 4))]
    assert again.calls == [None, (3, False), (4, False)]


def test_without_lora_pro_it_resumes_as_well(tmp_path: Path):
    whole = trainer_of(tmp_path, NoisyAverage(), lora_pro=False, max_steps=3)
    whole.train()
    resumed = trainer_of(tmp_path, NoisyAverage(), lora_pro=False, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(factors(resumed), factors(whole))


def test_every_save_holds_the_plain_adapter_that_the_method_exports(whole: Any, tmp_path: Path):
    folder, trainer, method = whole
    trained = factors(trainer)
    trainer.save_model(str(tmp_path))
    assert_same(saved(tmp_path), averaged(method))
    assert_same(saved(folder / "checkpoint-4"), averaged(method))
    assert_same(factors(trainer), trained) and differ(trained, averaged(method))
    assert FILE in read_manifest(folder / "checkpoint-4").files


def test_the_best_model_has_the_factors_that_were_trained(tmp_path: Path):
    scores, recorder = iter([0.1, 1.0]), Recorder()
    trainer = trainer_of(
        tmp_path,
        NoisyAverage(),
        recorder,
        **{"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "score"},
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert_same(factors(trainer), recorder.seen[1])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_resume_to_the_bit(nursery: Nursery, tmp_path: Path):
    job = {"jobs": "method_jobs", "ranks": 2}
    whole = nursery.finish(tmp_path, **job)
    resumed = nursery.finish(tmp_path, resume=str(tmp_path / "checkpoint-2"), **job)
    for of_rank in (*whole, *resumed):
        assert_same(of_rank["factors"], whole[0]["factors"])
        assert_same(of_rank["average"], whole[0]["average"])
    assert whole[1]["calls"] == "[1, [1, false], [2, false], [3, false], [4, false]]"
    assert resumed[1]["calls"] == "[null, [3, false], [4, false]]"


# ---- refused ----


class Other(LoRAMethod):
    name = "other"


class Fast(LoRAMethod):
    name, has_state = "fast", False


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "holds the state of the method 'noisy_average', which this training does not have. Add the method"),
        ([NoisyAverage, Fast], None),
        ([NoisyAverage, Other], "'noisy_average' cannot be combined with other: Keep one."),
        ([NoisyAverage, NoisyAverage], "the method 'noisy_average' was given twice. Keep one of them."),
    ],
)
def test_a_checkpoint_with_other_methods_is_refused_by_name(
    whole: Any, tmp_path: Path, methods: list[type[LoRAMethod]], message: str | None
):
    trainer = trainer_of(tmp_path, *(method() for method in methods))
    before = factors(trainer)
    if message is None:
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))
        return
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))
    assert_same(factors(trainer), before)


def test_a_checkpoint_without_the_method_is_refused_by_name(tmp_path: Path):
    trainer_of(tmp_path, max_steps=2).train()
    method = NoisyAverage()
    trainer = trainer_of(tmp_path, method)
    with pytest.raises(ValueError, match="holds no state of the method 'noisy_average', which this training has"):
        trainer.train(resume_from_checkpoint=True)
    assert method.calls == []


def test_a_setting_that_the_method_names_is_refused(tmp_path: Path):
    trainer = trainer_of(tmp_path, NoisyAverage(), lora_pro_mode="full_8bit")
    with pytest.raises(ValueError, match=r"combined with lora_pro_mode=full_8bit: Use full\."):
        trainer.train()
    with pytest.raises(ValueError, match="combined with other: Keep one"):
        require_compatible([NoisyAverage(), Other()], {})


def test_a_model_that_accelerate_compiles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`accelerate launch --dynamo_backend` sets no argument of the training."""
    trainer = trainer_of(tmp_path, FlatLoRACallback())
    monkeypatch.setattr(AcceleratorState().dynamo_plugin, "backend", DynamoBackend.EAGER)
    with pytest.raises(ValueError, match="combined with torch_compile=True: "):
        trainer.train()


def test_a_damaged_state_is_named(whole: Any, tmp_path: Path):
    trainer_of(tmp_path, NoisyAverage(), max_steps=2).train()
    torch.save({"weights": 1}, tmp_path / "checkpoint-2" / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} is cut off or damaged \(it holds no state of a method\)"):
        trainer_of(tmp_path, NoisyAverage()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_state_that_could_not_be_read_is_not_saved(tmp_path: Path):
    with pytest.raises(ValueError, match="the state of the method 'x' holds a set, which no checkpoint can give back"):
        write_method_state(tmp_path, "x", {"seen": [{1, 2}]})


def test_a_plain_trainer_does_not_resume_a_state(whole: Any, tmp_path: Path):
    trainer = trainer_of(tmp_path, NoisyAverage(), cls=Trainer, max_steps=2)
    trainer.train()
    again = trainer_of(tmp_path, NoisyAverage(), cls=Trainer)
    with pytest.raises(ValueError, match=r"does not load the state of the method 'noisy_average'\. Use LoRAProTrainer"):
        again.train(resume_from_checkpoint=True)


def test_weights_alone_start_anew_unless_they_are_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer_of(tmp_path, NoisyAverage(), max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="it holds the exported adapter without the factors that were trained"):
        trainer_of(tmp_path, NoisyAverage()).train(resume_from_checkpoint=True)

    class Kept(NoisyAverage):
        export = LoRAMethod.export

    method = Kept()
    with caplog.at_level(logging.WARNING, "lorapro_hf"):
        trainer_of(tmp_path, method).train(resume_from_checkpoint=True)
    assert "holds no optimizer state" in caplog.text and method.calls[0] == 2


# ---- at the right moments ----


def test_after_step_is_told_of_a_step_that_the_optimizer_left_out(tmp_path: Path):
    class Spoiling(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))

    method = NoisyAverage()
    trainer_of(tmp_path, method, Spoiling()).train()
    assert method.calls[1:] == [(1, False), (2, True), (3, False), (4, False)]


def test_a_step_that_a_scaler_leaves_out_is_no_step_of_the_method():
    method, model = NoisyAverage(), tiny_lora()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = build(LoRAProTrainer, arguments(Path("unused"), max_steps=1), model=model, callbacks=[method])
    method._is_led = True
    method.before_training(model, [{"input_ids": [0]}])
    method.on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (float("inf"), 1.0):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = scaler.scale(torch.full_like(parameter, value))
        scaler.step(optimizer)
        scaler.update()
    assert method.calls == [1, (1, False)]
    method.release()
    optimizer.step()
    assert len(method.calls) == 2


def test_nothing_is_left_in_the_model_after_an_exception(tmp_path: Path):
    class Failing(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    method = NoisyAverage()
    trainer = trainer_of(tmp_path, method, Failing())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.optimizer.optimizer.step()
    assert method.calls == [2] and not method._is_led


def test_several_losses_of_a_step_share_one_context(tmp_path: Path):
    entered: list[int] = []

    class Counting(LoRAMethod):
        name = "counting"

        def forward_context(self) -> Any:
            entered.append(1)
            return contextlib.nullcontext()

    class Twice(LoRAProTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + super().compute_loss(*args, **kwargs)

    trainer_of(tmp_path, Counting(), cls=Twice, max_steps=2, save_strategy="no").train()
    assert len(entered) == 4  # micro-batches


def test_a_model_that_is_made_for_each_training_is_prepared(tmp_path: Path):
    class Marking(Fast):
        def before_training(self, model: Any, batches: Any) -> None:
            model.is_prepared = True

    trainer = build(
        LoRAProTrainer,
        arguments(tmp_path, max_steps=1),
        model_init=lambda: tiny_lora(),
        callbacks=[Marking()],
        lora_pro_config={},
    )
    trainer.train()
    assert trainer.model.is_prepared
    assert not (tmp_path / MANIFEST).exists()


def test_a_method_without_a_name_is_refused():
    with pytest.raises(TypeError, match="Nameless has no name: set `name`"):

        class Nameless(LoRAMethod):
            pass
