"""Every save holds the adapter that is trained, and wrappers that would keep it out are refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.peft_model
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import CASES
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Trainer, TrainerControl, TrainerState

from grids import rest_slow
from lora_layers import ROWS, Row, needs_weight_tying, tied_llama
from lorapro_hf import (
    LoRAProCallback,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    create_lorapro_optimizer,
    find_lora_pairs,
)
from lorapro_hf.checkpoints import agreement
from lorapro_hf.checkpoints.adapters import find_unsaved, require_pairs_in_checkpoint, saving_error
from lorapro_hf.distributed.engines import require_supported_engine
from lorapro_hf.hub import push_adapter, save_adapter
from lorapro_hf.trainer import saving
from trainer_helpers import arguments, build, tiny_lora

LAYER = "base_model.model.model.layers.0"
FILE = "adapter_model.safetensors"
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A model with an adapter, of which one layer is in a wrapper."""
    model = tiny_lora()
    model.set_submodule(LAYER, wrap(model.get_submodule(LAYER)))
    return model


class Parallel(nn.parallel.DistributedDataParallel):
    """Without processes that it could talk to."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT saves the last matrix B no more, as if a wrapper had hidden it."""
    given = peft.peft_model.get_peft_model_state_dict

    def without_last(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: t for name, t in given(*args, **kwargs).items() if "1.mlp.down_proj.lora_B" not in name}

    monkeypatch.setattr(peft.peft_model, "get_peft_model_state_dict", without_last)


LOST = r"adapter_model.safetensors: \S+1.mlp.down_proj.lora_B.weight is missing there, but has shape \[32, 4\]"


# ---- at the start ----


def use_trainer(model: nn.Module, folder: Path) -> None:
    build(LoRAProTrainer, arguments(folder), model)


def use_factory(model: nn.Module, _: Path) -> None:
    LoRAProOptimizerFactory()(model, lr=1e-2)


def use_callback(model: nn.Module, folder: Path) -> None:
    build(Trainer, arguments(folder), model, callbacks=[LoRAProCallback()]).train()


@pytest.mark.parametrize("wrap", rest_slow([checkpoint_wrapper, torch.compile, Parallel]))
@pytest.mark.parametrize("use", [use_trainer, use_factory, use_callback])
def test_wrappers_inside_are_refused_at_the_start(wrap: Any, use: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(is|part of it is) wrapped by .*that nobody can load"):
        use(wrapped(wrap), tmp_path)


def test_optimizer_refuses_the_wrapper_that_hides_adapters() -> None:
    message = r"model.layers.0.self_attn.q_proj is inside torch's checkpoint_wrapper.*gradient_checkpointing_enable"
    with pytest.raises(ValueError, match=message):
        create_lorapro_optimizer(wrapped(checkpoint_wrapper), lr=1e-2)
    assert len(find_lora_pairs(wrapped(Parallel))) == 14  # PEFT finds these


def test_activation_checkpointing_of_fsdp_is_refused() -> None:
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False)
    state = SimpleNamespace(distributed_type="FSDP", fsdp_plugin=plugin)
    require_supported_engine(state, "")
    plugin.activation_checkpointing = True
    with pytest.raises(RuntimeError, match=r"fsdp_activation_checkpointing.*gradient_checkpointing=True"):
        require_supported_engine(state, "")


# ---- after a save ----


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_all_kinds_of_layers_are_found(row: Row, tmp_path: Path) -> None:
    model = row.build()
    model.save_pretrained(tmp_path)
    assert find_unsaved(tmp_path, model) is None
    tensors = load_file(tmp_path / FILE)
    for letter in "AB":
        kept = {name: t for name, t in tensors.items() if f"lora_{letter}" not in name and f"_{letter}" not in name}
        save_file(kept, tmp_path / FILE)
        lack = find_unsaved(tmp_path, model)
        assert lack is not None and lack.startswith(f"{tmp_path / FILE}: base_model.model.body.") and letter in lack


@pytest.mark.parametrize("case", [*CASES, pytest.param("tied", marks=needs_weight_tying)])
def test_all_kinds_of_adapters_are_found(case: str, tmp_path: Path) -> None:
    model = tied_llama() if case == "tied" else CASES[case]()
    assert find_unsaved(tmp_path, model) is None  # a folder without files tells nothing
    model.save_pretrained(tmp_path)
    assert find_unsaved(tmp_path, model) is None
    assert find_unsaved(tmp_path, torch.compile(model)) is None  # type: ignore[arg-type]


def test_an_adapter_that_is_not_saved_is_named(tmp_path: Path) -> None:
    model = CASES["several"]()
    model.save_pretrained(tmp_path, selected_adapters=["default", "third"])
    assert find_unsaved(tmp_path, model) == f"{tmp_path} has no file of the adapter 'other'"


@pytest.mark.usefixtures("losing")
def test_a_checkpoint_without_a_factor_ends_the_training(tmp_path: Path) -> None:
    trainer = build(LoRAProTrainer, arguments(tmp_path, **SAVING))
    with pytest.raises(ValueError, match=LOST + r".*Take wrappers off .*gradient_checkpointing=True"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1" / "trainer_state.json").exists()  # it counts as unfinished
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match=LOST):
        trainer.save_model()


def test_a_save_that_writes_no_weights_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = build(LoRAProTrainer, arguments(tmp_path, **SAVING))
    trainer.train()
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", lambda *args, **kwargs: None)
    (tmp_path / FILE).unlink(missing_ok=True)
    assert (tmp_path / "checkpoint-2" / FILE).is_file()  # these are not what has just been saved
    with pytest.raises(
        ValueError, match=rf"{tmp_path} has no file of an adapter or a model\. The trained adapter cannot"
    ):
        trainer.save_model()


class SavesTwice(LoRAProTrainer):
    """The first rank alone saves once more within a checkpoint."""

    def _save_optimizer_and_scheduler(self, output_dir: str | None, *args: Any, **kwargs: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir, *args, **kwargs)
        if self.is_world_process_zero():
            self.save_model(f"{self.args.output_dir}/apart")


def test_only_the_save_of_all_ranks_waits_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(saving, "raise_on_all_ranks", heard.append)
    build(SavesTwice, arguments(tmp_path, **{**SAVING, "max_steps": 1})).train()
    assert heard == [None] and (tmp_path / "apart" / FILE).is_file()


def test_an_error_of_any_rank_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OverflowError("its own")

    monkeypatch.setattr(agreement, "gather_object", lambda own: [*own, "the disk of the other node"])
    with pytest.raises(ValueError, match="the disk of the other node"):
        agreement.check_together(lambda: None)
    with pytest.raises(OverflowError, match="its own"):
        agreement.check_together(fail)


@pytest.mark.usefixtures("losing")
def test_plain_trainer_with_the_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=LOST):
        build(Trainer, arguments(tmp_path, **SAVING), callbacks=[LoRAProCallback()]).train()


@pytest.mark.parametrize("name", [None, "mine"])
def test_the_callback_finds_the_checkpoint_of_a_search(name: str | None, losing: None, tmp_path: Path) -> None:
    state = TrainerState(global_step=2, is_hyper_param_search=True, trial_name=name)
    tiny_lora().save_pretrained(tmp_path / "mine" / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"{tmp_path}/mine/checkpoint-2/{LOST}"):
        LoRAProCallback().on_save(arguments(tmp_path), state, TrainerControl(), model=tiny_lora())


def test_the_callback_says_that_it_found_no_checkpoint(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    LoRAProCallback().on_save(arguments(tmp_path), TrainerState(global_step=2), TrainerControl(), model=tiny_lora())
    assert f"There is no {tmp_path}/checkpoint-2: LoRAProCallback cannot see" in caplog.text


@pytest.mark.usefixtures("losing")
def test_save_and_push_of_a_loop(tmp_path: Path) -> None:
    for save in (
        lambda: save_adapter(tiny_lora(), None, tmp_path),
        lambda: push_adapter(tiny_lora(), None, "me/it", tmp_path),
    ):
        with pytest.raises(ValueError, match=LOST):
            save()


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    model = tiny_lora()
    model.save_pretrained(tmp_path)
    assert saving_error(tmp_path, model) is None
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-1])
    assert "was saved, but cannot be read" in str(saving_error(tmp_path, model))


def test_message_names_the_wrapper(tmp_path: Path) -> None:
    model = wrapped(checkpoint_wrapper)
    model.save_pretrained(tmp_path / "plain")
    if find_unsaved(tmp_path / "plain", model) is None:
        pytest.skip("this PEFT saves the adapter of a wrapped layer")
    with pytest.raises(
        ValueError, match=r"q_proj.lora_A.weight is missing.*model.layers.0 is wrapped by checkpoint_wrapper"
    ):
        save_adapter(model, None, tmp_path)


def test_off_is_the_parent(losing: None, tmp_path: Path) -> None:
    from lorapro_hf import LoRAProTrainingArguments

    build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, **SAVING)).train()
    assert (tmp_path / "checkpoint-2" / FILE).is_file()


# ---- on resuming under an engine ----


def write_whole(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model_fsdp.bin")
    return folder / "pytorch_model_fsdp.bin"


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> Path:
    place = folder / "pytorch_model_fsdp_0"
    torch.distributed.checkpoint.save({"model": state}, checkpoint_id=place, no_dist=True)
    return place


def write_shards_as_peft(state: dict[str, torch.Tensor], folder: Path) -> Path:
    return write_shards({name.replace(".default.", "."): tensor for name, tensor in state.items()}, folder)


@pytest.mark.parametrize("write", [write_whole, write_shards, write_shards_as_peft])
def test_files_of_fsdp_are_examined(write: Any, tmp_path: Path) -> None:
    model = tiny_lora()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    file = write(state, tmp_path)
    require_pairs_in_checkpoint(tmp_path, model)
    lost = next(name for name in state if "lora_B" in name)
    write({name: tensor for name, tensor in state.items() if name != lost}, tmp_path)
    with pytest.raises(
        ValueError, match=rf"cannot resume from {file}: \S+q_proj\.lora_B\S+ is missing.*without resume"
    ):
        require_pairs_in_checkpoint(tmp_path, model)
    write({**state, lost: state[lost][:1].clone()}, tmp_path)
    with pytest.raises(ValueError, match=r"has shape \[1, 4\] there, but has shape \[32, 4\] in the model"):
        require_pairs_in_checkpoint(tmp_path, model)


def test_several_adapters_that_fsdp_saves_one_of(tmp_path: Path) -> None:
    """accelerate has PEFT save the active adapter of the model alone."""
    model = CASES["several"]()
    state = peft.get_peft_model_state_dict(model, adapter_name="third")
    write_shards({name: tensor.detach() for name, tensor in state.items()}, tmp_path)
    with pytest.raises(ValueError, match=r"lora_A.* is missing there"):
        require_pairs_in_checkpoint(tmp_path, model)
