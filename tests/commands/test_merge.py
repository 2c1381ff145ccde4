"""`lorapro merge` writes a model that plain transformers loads to the logits of the adapter on its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    set_seed,
)

from evaluation_helpers import tiny_model
from grids import rest_slow
from lorapro_hf import BeamLoRACallback, BoostingCallback, LoRAProTrainer, LoRAProTrainingArguments, LoRASB, cli
from lorapro_hf.commands.merge import run
from trainer_helpers import arguments, build, tiny_base

LINEAR = ["q_proj", "v_proj", "down_proj"]


def small(**settings: Any) -> LlamaForCausalLM:
    model = tiny_base()
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), **settings}))


def saved(model: Any, folder: Path, disturb: bool = True, **settings: Any) -> Any:
    """A model with an adapter that changes its outputs; base and adapter are saved in the folder."""
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": LINEAR, **settings}))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad and disturb:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(inputs).logits


IDS = torch.arange(3, 15).view(1, 12)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
        *rest_slow(
            [
                ({}, {"use_dora": True, "bias": "all"}),
                ({}, {}),
                ({}, {"use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 2}}),
                ({}, {"modules_to_save": ["lm_head", "norm"]}),
                ({}, {"init_lora_weights": "pissa"}),
                ({}, {"trainable_token_indices": [3, 5]}),
                ({"tie_word_embeddings": True}, {}),
                ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
            ]
        ),
    ],
    ids=lambda each: "-".join(map(str, each)) or "plain",
)
def test_logits_of_each_kind_of_adapter(
    base: dict[str, Any], settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(**base)
    plain = logits(model, IDS)
    saved(model, tmp_path, **settings, task_type="CAUSAL_LM")
    expected = logits(PeftModel.from_pretrained(small(**base), str(tmp_path / "adapter")).eval(), IDS)
    assert (expected - plain).abs().max() > 0.01
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)
    assert "Outputs agree" in capsys.readouterr().out
    is_changed_embedding = "target_modules" in settings or "embed_tokens" in settings.get("modules_to_save", ())
    assert merged.config.tie_word_embeddings == (bool(base) and not is_changed_embedding)


def merge(folder: Path, *words: str) -> int:
    return cli.main(["merge", str(folder / "adapter"), str(folder / "out"), *words])


def test_experts(tmp_path: Path) -> None:
    set_seed(0)
    config = MixtralConfig(**{**tiny_base().config.to_dict(), "num_local_experts": 4, "model_type": "mixtral"})
    adapted = saved(
        MixtralForCausalLM(config),
        tmp_path,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    expected = logits(adapted, IDS)
    assert merge(tmp_path) == 0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS), expected)


def test_convolutions_of_a_model_for_pictures(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5, layer_type="basic")
    settings: dict[str, Any] = {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]}
    adapted = saved(ResNetForImageClassification(config), tmp_path, **settings)
    pictures = torch.randn(2, 3, 40, 40)
    expected = logits(adapted, pictures)
    assert merge(tmp_path) == 0
    merged = ResNetForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, pictures), expected, rtol=1e-4, atol=1e-5)


def test_a_head_with_labels_that_the_base_does_not_have(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    adapted = saved(BertForSequenceClassification(config), tmp_path, target_modules=["query"], task_type="SEQ_CLS")
    expected = logits(adapted, IDS)
    content = json.loads((tmp_path / "base/config.json").read_text())
    del content["id2label"], content["label2id"]
    (tmp_path / "base/config.json").write_text(json.dumps(content))
    assert merge(tmp_path) == 0
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged, IDS), expected)


def test_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    base = small()
    base.save_pretrained(tmp_path / "first")
    base.resize_token_embeddings(52)
    adapted = saved(base, tmp_path, modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    expected = logits(adapted, IDS + 36)
    assert merge(tmp_path, "--base", str(tmp_path / "first")) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 52
    torch.testing.assert_close(logits(merged, IDS + 36), expected)


METHODS = {
    "boosters": ({}, [BoostingCallback(2, rank=4)]),
    "plain": ({"lora_pro_mode": "full"}, []),
    "lora_sb": ({"lora_pro": False}, [LoRASB()]),
    "beamlora": ({}, [BeamLoRACallback(every=2)]),
}


@pytest.mark.parametrize("name", rest_slow(METHODS))
def test_what_each_method_saves(name: str, tmp_path: Path) -> None:
    settings, callbacks = METHODS[name]
    model = saved(small(), tmp_path, name != "lora_sb", r=4, task_type="CAUSAL_LM").train()
    args = arguments(tmp_path / "adapter", LoRAProTrainingArguments, **settings)
    trainer = build(LoRAProTrainer, args, model, callbacks=callbacks)
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model.eval(), IDS)
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)
    method = "LoRA-Pro (mode full)" if name == "plain" else "LoRA"
    assert f"| method | {method}" in ModelCard.load(tmp_path / "out/README.md").text


def test_precision_files_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model(tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(base).bfloat16()
    model.generation_config.eos_token_id = 5
    expected = logits(saved(model, tmp_path, task_type="CAUSAL_LM"), IDS)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "base/generation_config.json").read_text())
    # as some models on the Hub have it, which transformers loads and refuses to save
    (tmp_path / "base/generation_config.json").write_text(json.dumps({**settings, "temperature": 0.5}))
    assert merge(tmp_path) == 0
    out = tmp_path / "out"
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16 and merged.generation_config.eos_token_id == [5, tokenizer.eos_token_id]
    error = (logits(merged, IDS) - expected).abs().max()
    assert 1e-4 < error < 0.05 * expected.abs().max()
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    printed = capsys.readouterr().out
    for line in (
        f"vllm serve {out}",
        f"{out} --outfile {out}.gguf --outtype bf16",
        "ollama create out -f",
        "(bfloat16)",
    ):
        assert line in printed
    card = ModelCard.load(out / "README.md")
    assert "| adapter | `adapter` |" in card.text and card.data.tags == ["lora", "merged"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base", "out", "tokenizer"]


def test_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(small(), tmp_path, task_type="CAUSAL_LM")
    (tmp_path / "out").mkdir()
    assert merge(tmp_path, "--dtype", "float16") == 0
    (tmp_path / "out/old").touch()
    assert merge(tmp_path) == 2 and "replace it by --overwrite" in capsys.readouterr().err
    assert merge(tmp_path, "--overwrite") == 0
    assert not (tmp_path / "out/old").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32
    capsys.readouterr()
    for name, said in (("base", "holds no model"), ("adapter", "holds no model")):
        words = ["merge", str(tmp_path / "adapter"), str(tmp_path / name), "--overwrite"]
        assert cli.main(words) == 2
        assert (said if name == "adapter" else "would remove") in capsys.readouterr().err


def test_a_quantized_base_is_dequantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    small(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    expected = logits_of_quantized(saved(model, tmp_path, task_type="CAUSAL_LM"))
    assert merge(tmp_path) == 0
    assert "is quantized (bitsandbytes): its weights are dequantized" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-3, atol=1e-3)


def logits_of_quantized(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    saved(small(), folder, task_type="CAUSAL_LM")
    small(hidden_size=16).save_pretrained(folder / "narrow")
    small(num_hidden_layers=3).save_pretrained(folder / "deep")
    get_peft_model(small(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(folder / "ia3")
    nameless = get_peft_model(small(), LoraConfig(target_modules=LINEAR, task_type="CAUSAL_LM"))
    nameless.save_pretrained(folder / "nameless")
    (folder / "weightless").mkdir()
    (folder / "weightless/adapter_config.json").write_text((folder / "adapter/adapter_config.json").read_text())
    (folder / "damaged").mkdir()
    (folder / "damaged/adapter_config.json").write_text((folder / "adapter/adapter_config.json").read_text())
    (folder / "damaged/adapter_model.safetensors").write_bytes(b"1")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("base", "base is a whole model, no adapter: there is nothing to merge"),
        ("adapter --base {}/narrow", "have another shape in the adapter's file than in the model"),
        ("adapter --base {}/deep", "tensors of the model are missing in the adapter's file"),
        ("adapter --base {}/none", "there is no folder of that name here"),
        ("ia3", "is an adapter of the kind IA3: name one that was made from LoraConfig"),
        ("nameless", "does not name its base model: add --base"),
        ("weightless", "has no weights, adapter_model.safetensors"),
        ("damaged", "It is cut off or damaged"),
        (".", "holds neither adapter_config.json (an adapter) nor config.json (a model). Did you mean"),
        ("none", "there is no folder"),
        ("adapter/adapter_config.json", "is a file: name the folder it is in"),
    ],
)
def test_bad_input_is_one_line(
    words: str, said: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = words.format(adapters).split()
    assert cli.main(["merge", f"{adapters}/{first}", str(tmp_path / "new/out"), *others]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list(tmp_path.iterdir())


def test_a_merge_that_changes_outputs_leaves_nothing(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "merge_adapter", lambda model: model.unload())
    assert cli.main(["merge", str(adapters / "adapter"), str(tmp_path / "out")]) == 1
    assert "the merged model gives other outputs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
