"""TRL's trainers with LoRA-Pro: each of them in each of the three ways takes the step that it should."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from grids import rest_slow

pytest.importorskip("trl")

import trl

import lorapro_hf
from lorapro_hf import (
    LoRAProAdamW,
    LoRAProCallback,
    LoRAProConfig,
    LoRAProOptimizerFactory,
    LoRAProSFTConfig,
    LoRAProSFTTrainer,
)
from lorapro_hf.trainer.callback import unwrap_optimizer
from trl_helpers import (
    FirstStep,
    adapted_chat_model,
    adapter,
    chat_model,
    completions,
    conversations,
    judged,
    preferences,
    prompts,
    reward_model,
    tokenizer,
    vowels,
)

RATE = 1e-2
COMMON: dict[str, Any] = {
    **{"learning_rate": RATE, "lr_scheduler_type": "constant", "max_steps": 2, "per_device_train_batch_size": 4},
    **{"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no"},
}
TAKES_A_FACTORY = ("SFT", "Reward")  # the others get it as an attribute, before train()
KINDS: dict[str, dict[str, Any]] = {
    "SFT": {"model": chat_model, "data": conversations, "settings": {"max_length": 32}},
    "DPO": {"model": chat_model, "data": preferences, "settings": {"max_length": 32}},
    "KTO": {"model": chat_model, "data": judged, "settings": {"max_length": 32}},
    "GRPO": {
        "model": chat_model,
        "data": prompts,
        "settings": {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0},
        "more": {"reward_funcs": vowels},
    },
    "Reward": {"model": reward_model, "data": preferences, "settings": {"max_length": 32}, "task": "SEQ_CLS"},
}


def trainer_of(kind: str, way: str, folder: Path, model: Any = None, **settings: Any) -> tuple[Any, FirstStep]:
    """A trainer whose adapter is made inside it, and the record of its first step."""
    case, record = KINDS[kind], FirstStep()
    own = "LoRAPro" if way == "mixin" else ""
    home = lorapro_hf if way == "mixin" else trl
    arguments: dict[str, Any] = {**COMMON, **case["settings"], "output_dir": str(folder), **settings}
    more: dict[str, Any] = {**case.get("more", {}), "callbacks": [record]}
    config = {"mode": "efficient", "efficient_projected": True}  # as the callback
    factory = (LoRAProOptimizerFactory, {"lr": RATE, "config": config})
    if way == "mixin" and "lora_pro_mode" not in settings:
        arguments = {**{f"lora_pro_{name}": value for name, value in config.items()}, **arguments}
    elif way == "factory" and kind in TAKES_A_FACTORY:
        more["optimizer_cls_and_kwargs"] = factory
    elif way == "callback":
        more["callbacks"].append(LoRAProCallback())
    trainer = getattr(home, f"{own}{kind}Trainer")(
        model=case["model"]() if model is None else model,
        args=getattr(home, f"{own}{kind}Config")(**arguments),
        train_dataset=case["data"](),
        processing_class=tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else adapter(task_type=case.get("task", "CAUSAL_LM")),
        **more,
    )
    if way == "factory":
        trainer.optimizer_cls_and_kwargs = factory
    return trainer, record


TRL_1 = Version(trl.__version__) >= Version("1.0")
needs_factories = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers 4 knows no optimizer factories"
)


@pytest.mark.parametrize(
    "way", rest_slow(["mixin", "callback", pytest.param("factory", marks=needs_factories)], fast=2)
)
@pytest.mark.parametrize("kind", rest_slow(KINDS))
def test_takes_the_projected_step(kind: str, way: str, tmp_path: Path):
    trainer, record = trainer_of(kind, way, tmp_path)
    trainer.train()
    assert isinstance(unwrap_optimizer(trainer.optimizer), LoRAProAdamW) == (way != "callback")
    record.assert_efficient_step(RATE)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ("lora_pro_grad_norm" in logged[0]) == (way == "mixin")


@pytest.mark.parametrize("kind", rest_slow(KINDS))
def test_turned_off_it_is_the_parent_to_the_bit(kind: str, tmp_path: Path):
    own, _ = trainer_of(kind, "mixin", tmp_path, lora_pro=False)
    parent, _ = trainer_of(kind, "parent", tmp_path)
    for trainer in (own, parent):
        transformers.set_seed(0)
        trainer.train()
        assert type(unwrap_optimizer(trainer.optimizer)) is torch.optim.AdamW
    assert_same_parameters(own.model, parent.model)


@pytest.mark.parametrize("kind", rest_slow(KINDS))
def test_defaults_are_those_of_trl_and_train(kind: str, tmp_path: Path):
    case, record = KINDS[kind], FirstStep()
    given = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 4}
    given |= {**case["settings"], "report_to": "none"}
    args = getattr(lorapro_hf, f"LoRAPro{kind}Config")(
        **given, lora_pro_mode="efficient", lora_pro_efficient_projected=True
    )
    theirs = getattr(trl, f"{kind}Config")(**given)
    for field in fields(theirs):
        assert getattr(args, field.name) == getattr(theirs, field.name), field.name
    assert args.bf16 and args.gradient_checkpointing
    assert args.learning_rate == {"SFT": 2e-5, "DPO": 1e-6, "KTO": 1e-6, "GRPO": 1e-6, "Reward": 1e-4}[kind], (
        "docs/trl.md says so"
    )
    trainer = getattr(lorapro_hf, f"LoRAPro{kind}Trainer")(
        model=case["model"](),
        args=args,
        train_dataset=case["data"](),
        processing_class=tokenizer(),
        peft_config=adapter(task_type=case.get("task", "CAUSAL_LM")),
        callbacks=[record],
        **case.get("more", {}),
    )
    trainer.train()
    assert {A.dtype for A, *_ in record.before.values()} == {torch.float32}, "bf16 is autocast's alone"
    record.assert_efficient_step(args.learning_rate)


@pytest.mark.parametrize("kind", rest_slow(KINDS))
def test_command_line_and_file(kind: str, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nlora_pro_mode: factored\nlora_pro_rtol: 1e-6\n")
    parser = trl.TrlParser((getattr(lorapro_hf, f"LoRAPro{kind}Config"),))
    (args,) = parser.parse_args_and_config(["--config", str(file), "--lora_pro_x_mode", "zero"])
    assert args.lora_pro_config == LoRAProConfig(mode="factored", rtol=1e-6, x_mode="zero")
    (args,) = parser.parse_args_and_config(["--config", str(file), "--no_lora_pro"])
    assert args.lora_pro is False


def test_the_head_of_a_reward_model_gets_plain_adamw(tmp_path: Path):
    trainer, _ = trainer_of("Reward", "mixin", tmp_path, max_steps=1)
    head = next(p for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad)
    start = head.detach().clone()
    gradients: list[torch.Tensor] = []
    trainer.callback_handler.callbacks[-1].on_pre_optimizer_step = lambda *a, **k: gradients.append(head.grad.clone())
    trainer.train()
    expected = nn.Parameter(start)
    expected.grad = gradients[0]
    torch.optim.AdamW([expected], lr=RATE, weight_decay=0.0, fused=True).step()
    torch.testing.assert_close(head.detach(), expected.detach())


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        pytest.param(conversations, {"packing": True}, marks=pytest.mark.slow),
        pytest.param(conversations, {"packing": True, "packing_strategy": "wrapped"}, marks=pytest.mark.slow),
        (completions, {"completion_only_loss": True}),
        pytest.param(conversations, {"assistant_only_loss": True}, marks=pytest.mark.slow),
    ],
    ids=["packing", "packing, wrapped", "completion only", "assistant only"],
)
def test_supervised_variants_learn(data: Any, settings: dict[str, Any], tmp_path: Path):
    arguments = {**COMMON, "max_length": 16, "max_steps": 8, "output_dir": str(tmp_path), **settings}
    trainer = LoRAProSFTTrainer(
        model=chat_model(),
        args=LoRAProSFTConfig(**{**arguments, "learning_rate": 1e-3}),
        train_dataset=data(4),
        processing_class=tokenizer(),
        peft_config=adapter(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    rest_slow([{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}]),
    ids=["padding_free", "packing"],
)
def test_packed_rows_have_the_gradients_of_padded_ones(settings: dict[str, Any], tmp_path: Path):
    records = []
    for more in ({"max_length": 64}, settings):
        all_rows = {"max_steps": 1, "per_device_train_batch_size": 8, **more}
        trainer, record = trainer_of("SFT", "mixin", tmp_path, **all_rows)
        records.append(record)
        trainer.train()
    padded, packed = records
    packed.assert_efficient_step(RATE)
    for name, (_, _, *gradients) in padded.before.items():
        for expected, found in zip(gradients, packed.before[name][2:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_neftune_changes_the_gradients_of_the_training_alone(tmp_path: Path):
    records = []
    for alpha in (None, 5.0):
        trainer, record = trainer_of("SFT", "mixin", tmp_path, max_steps=1, neftune_noise_alpha=alpha)
        records.append(record)
        trainer.train()
        record.assert_efficient_step(RATE)
        embeddings = trainer.model.train().get_input_embeddings()
        assert torch.equal(embeddings(torch.tensor([5])), embeddings.weight[[5]]), "the trained model has no noise"
    plain, noisy = (record.before for record in records)
    assert all(not torch.allclose(noisy[name][2], values[2], rtol=1e-2) for name, values in plain.items())


@pytest.mark.parametrize(
    ("kind", "settings"),
    rest_slow([("DPO", {}), ("DPO", {"precompute_ref_log_probs": True}), ("KTO", {}), ("GRPO", {"beta": 0.1})]),
    ids=["DPO", "DPO, computed before", "KTO", "GRPO"],
)
def test_a_reference_adapter_is_left_alone(kind: str, settings: dict[str, Any], tmp_path: Path):
    trainer, record = trainer_of(kind, "mixin", tmp_path, model=adapted_chat_model(), **settings)
    assert ("ref" in trainer.model.peft_config) == TRL_1
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    record.assert_efficient_step(RATE)
    pairs = unwrap_optimizer(trainer.optimizer).pairs
    assert [pair.adapter_name for pair in pairs] == ["default"] * 14
    for name, value in trainer.model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(value.detach(), frozen[name], rtol=0, atol=0)


@pytest.mark.parametrize("model", ["without an adapter", "a name", "a frozen adapter"])
@pytest.mark.parametrize("kind", rest_slow(KINDS))
def test_a_missing_adapter_is_noticed_before_the_data_is_read(
    kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("the data set was read")

    case = KINDS[kind]
    data = case["data"]()
    monkeypatch.setattr(type(data), "map", unread)
    given = "someone/something" if model == "a name" else case["model"]()
    message = f"LoRAPro{kind}Trainer got a model without an adapter.*peft_config=LoraConfig.*--use_peft"
    if model == "a frozen adapter":
        given = get_peft_model(given, adapter(task_type=case.get("task", "CAUSAL_LM"), inference_mode=True))
        message = "frozen.*is_trainable=True"
    make, config = getattr(lorapro_hf, f"LoRAPro{kind}Trainer"), getattr(lorapro_hf, f"LoRAPro{kind}Config")
    args = config(output_dir=str(tmp_path), **COMMON, **case["settings"])
    with pytest.raises(ValueError, match=message):
        make(given, args=args, train_dataset=data, processing_class=tokenizer(), **case.get("more", {}))


@pytest.mark.parametrize("home", ["trl.experimental.kto", "nowhere"])
def test_kto_is_found_where_a_version_of_trl_has_it(home: str, monkeypatch: pytest.MonkeyPatch):
    had = {"KTOConfig": trl.KTOConfig, "KTOTrainer": trl.KTOTrainer}
    without = ModuleType("trl")
    without.__path__ = []  # a package without submodules
    monkeypatch.setitem(sys.modules, "trl", without)
    monkeypatch.setitem(sys.modules, "trl.experimental", without)
    elsewhere = ModuleType("trl.experimental.kto")
    vars(elsewhere).update(had if home == elsewhere.__name__ else {})
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    monkeypatch.delitem(sys.modules, "lorapro_hf.trainer.kto", raising=False)
    if home == "nowhere":
        with pytest.raises(ImportError, match=r"needs KTOTrainer.*pip install"):
            importlib.import_module("lorapro_hf.trainer.kto")
    else:
        found = importlib.import_module("lorapro_hf.trainer.kto").LoRAProKTOTrainer
        assert issubclass(found, had["KTOTrainer"]) and issubclass(found, lorapro_hf.LoRAProTrainerMixin)


def test_a_subclass_that_makes_its_adapter_is_left_to_it(tmp_path: Path):
    class Adapting(trl.SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, peft_config=adapter(), **kwargs)

    make = type("LoRAProAdapting", (lorapro_hf.LoRAProTrainerMixin, Adapting), {})
    args = LoRAProSFTConfig(output_dir=str(tmp_path), **COMMON, max_length=32)
    trainer = make(chat_model(), args=args, train_dataset=conversations(), processing_class=tokenizer())
    assert len(lorapro_hf.find_lora_pairs(trainer.model)) == 14


@pytest.mark.parametrize("way", rest_slow(["parent", "callback", "mixin"]))
def test_trls_own_trainer_says_that_it_reads_no_settings(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make = LoRAProSFTTrainer if way == "mixin" else trl.SFTTrainer
    trainer = make(
        model=chat_model(),
        args=LoRAProSFTConfig(output_dir=str(tmp_path), **{**COMMON, "max_steps": 1}, max_length=32),
        train_dataset=conversations(),
        processing_class=tokenizer(),
        peft_config=adapter(),
        callbacks=[LoRAProCallback()] if way == "callback" else [],
    )
    trainer.train()
    told = [record for record in caplog.records if record.name == "lorapro_hf.trainer.arguments"]
    assert len(told) == (way == "parent")


SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_pro_mode": "full"}


def assert_same_parameters(model: nn.Module, other: nn.Module) -> None:
    expected = dict(other.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["SFT", pytest.param("GRPO", marks=pytest.mark.slow)])
def test_resumes_to_the_bit(kind: str, tmp_path: Path):
    whole, _ = trainer_of(kind, "mixin", tmp_path / "whole", **SAVING, learning_rate=1e-4)
    whole.train()
    again, _ = trainer_of(kind, "mixin", tmp_path / "again", **SAVING, learning_rate=1e-4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(again.model, whole.model)


@pytest.mark.slow
def test_resumes_to_the_bit_beside_another_adapter(tmp_path: Path):
    trainers = []
    for name in ("whole", "again"):
        model = adapted_chat_model()
        model.add_adapter("other", adapter())
        trainer, _ = trainer_of("DPO", "mixin", tmp_path / name, model=model, **SAVING, learning_rate=1e-4)
        trainers.append(trainer)
    whole, again = trainers
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(again.model, whole.model)


def test_measuring_the_gap_leaves_trls_own_logs_alone(tmp_path: Path):
    trainer, _ = trainer_of("SFT", "mixin", tmp_path, lora_pro_log_gap=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all("mean_token_accuracy" in entry for entry in logged)
    assert any("lora_pro_gap/lora_pro_gap" in entry for entry in trainer.state.log_history)


def test_trl_names_stay_on_the_card(tmp_path: Path):
    trainer, _ = trainer_of("SFT", "mixin", tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for tag in ("lora-pro", "peft", "trl", "sft"):
        assert f"- {tag}" in card


def test_quantized_base(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trl_helpers import saved_chat_model

    folder = saved_chat_model(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype=torch.bfloat16)
    settings = {"lora_pro_mode": "full", "lora_pro_master_factors": True, "max_steps": 8, "learning_rate": 1e-3}
    trainer, _ = trainer_of("SFT", "mixin", tmp_path / "out", model=model, **settings, bf16=True)
    pairs = lorapro_hf.find_lora_pairs(trainer.model)
    assert {pair.A.dtype for pair in pairs} == {torch.bfloat16 if TRL_1 else torch.float32}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@needs_factories
def test_trls_own_script_with_the_factory(tmp_path: Path):
    """`trl/scripts/sft.py` as it is installed, with the two changes that a user makes."""
    from trl_helpers import saved_chat_model

    script = (Path(trl.__file__).parent / "scripts" / "sft.py").read_text(encoding="utf-8")
    call = "        peft_config=get_peft_config(model_args),\n"
    assert script.count(call) == 1
    factory = '(LoRAProOptimizerFactory, {"lr": training_args.learning_rate})'
    script = script.replace(call, f"{call}        optimizer_cls_and_kwargs={factory},\n")
    script = script.replace("import argparse\n", "import argparse\nfrom lorapro_hf import LoRAProOptimizerFactory\n", 1)
    (tmp_path / "sft.py").write_text(script, encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    conversations().to_json(data / "train.jsonl")
    flags = {"model_name_or_path": saved_chat_model(tmp_path / "base"), "dataset_name": data, "lora_r": 4}
    flags |= {"lora_target_modules": "all-linear", "max_steps": 3, "max_length": 32, "learning_rate": 1e-4}
    flags |= {"output_dir": tmp_path / "out", "report_to": "none", "save_strategy": "no"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "sft.py", *words, "--use_peft", "--use_cpu", "--bf16", "false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    adapted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) > 0 for name, value in adapted.items() if "lora_B" in name)
