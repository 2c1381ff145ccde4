"""Model card, settings and picture beside a saved adapter; nothing is pushed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hub_helpers import model_of, tokenizer
from hub_server import card_problems
from lorapro_hf import LoRAProConfig, LoRAProTrainer, LoRAProTrainingArguments, create_lorapro_optimizer
from lorapro_hf.hub import compose, create_model_card, load_lora_pro_config, push_adapter, save_adapter
from lorapro_hf.hub.curves import draw_curves, loss_curves
from lorapro_hf.hub.describe import dataset_names
from lorapro_hf.hub.logs import evaluations_by_step, final_evaluation, number
from lorapro_hf.hub.usage import task_of
from lorapro_hf.trainer.hub_mixin import _markdown_of_parent
from trainer_helpers import arguments, build, sequences, tiny_lora

TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.arange(3, 11)[None]


def trainer_in(folder: Path, **settings: Any) -> LoRAProTrainer:
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> LoRAProTrainer:
    """A trainer after two steps, each with an evaluation and a checkpoint."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"lora_pro_mode": "factored", "lora_pro_trust_region": 0.03, "weight_decay": 0.1}
    made = trainer_in(tmp_path_factory.mktemp("trained") / "run", **settings)
    made.train()
    return made


def heard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lorapro_hf.hub")]


def bert() -> tuple[Any, dict[str, Any]]:
    config = BertConfig(vocab_size=48, num_labels=5, max_position_embeddings=16, **SMALL)
    return BertForSequenceClassification(config), {"input_ids": IDS}


def reward() -> tuple[Any, dict[str, Any]]:
    return LlamaForSequenceClassification(LlamaConfig(num_labels=1, **TOKENS, **SMALL)), {"input_ids": IDS}


def t5() -> tuple[Any, dict[str, Any]]:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=2
    )
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def vit() -> tuple[Any, dict[str, Any]]:
    config = ViTConfig(image_size=8, patch_size=4, num_labels=7, **SMALL)
    return ViTForImageClassification(config), {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)}


def wav2vec2() -> tuple[Any, dict[str, Any]]:
    config = Wav2Vec2Config(
        vocab_size=12, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", **SMALL,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config), {"input_values": torch.linspace(-1, 1, 64)[None]}


def whisper() -> tuple[Any, dict[str, Any]]:
    config = WhisperConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), {
        "input_features": torch.linspace(-1, 1, 128).view(1, 8, 16), "decoder_input_ids": IDS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "tag", "runs", "head"),
    [
        (bert, "text-classification", True, "classifier"),
        pytest.param(reward, "text-classification", True, "score", marks=pytest.mark.slow),
        (t5, "text2text-generation", True, None),
        pytest.param(vit, "image-classification", False, "classifier", marks=pytest.mark.slow),
        (wav2vec2, "automatic-speech-recognition", False, "lm_head"),
        pytest.param(whisper, "automatic-speech-recognition", False, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_snippet_loads_the_adapter(make: Any, tag: str, runs: bool, head: str | None, tmp_path: Path) -> None:
    base, inputs = make()
    targets = ["query", "q", "q_proj", "attention.q_proj"]
    settings = LoraConfig(
        r=2, target_modules=targets, modules_to_save=[head] if head else None, init_lora_weights=False
    )
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # heads too, so that none may stay behind
            parameter.data.normal_()
    save_adapter(model, {"mode": "efficient"}, tmp_path / "adapter", processing_class=tokenizer())
    card = create_model_card(model, {"mode": "efficient"}, tmp_path / "adapter", processing_class=tokenizer())
    assert task_of(model).tag == tag

    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "lorapro" not in code
    code = code.replace("path/to/the/base/model", str(tmp_path / "base"))
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    compile(code, "card", "exec")
    if not runs:  # picture, sound and their processors are not here
        code = "\n".join(line for line in code.split("\n\n")[1].splitlines() if "rocessor" not in line)
        code = f"from peft import PeftModel\nfrom transformers import {task_of(model).auto_class}\n{code}"
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("make", "head", "size"),
    [pytest.param(vit, "classifier", "num_labels", marks=pytest.mark.slow), (wav2vec2, "lm_head", "vocab_size")],
)
def test_snippet_replaces_the_head_of_the_checkpoint(make: Any, head: str, size: str, tmp_path: Path) -> None:
    base, inputs = make()
    other = type(base)(type(base.config).from_dict({**base.config.to_dict(), "id2label": {}, size: 3}))
    other.load_state_dict({k: v for k, v in base.state_dict().items() if head not in k}, strict=False)
    other.save_pretrained(tmp_path / "base")  # whose head is for other labels or letters
    settings = LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=[head], init_lora_weights=False)
    model = get_peft_model(base, settings).eval()
    save_adapter(model, None, tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", create_model_card(model, None, tmp_path / "adapter").text, re.DOTALL)[1]
    code = code.replace("path/to/the/base/model", str(tmp_path / "base"))
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    code = "\n".join(line for line in code.split("\n\n")[1].splitlines() if "rocessor" not in line)
    names: dict[str, Any] = {}
    exec(f"from peft import PeftModel\nfrom transformers import {task_of(model).auto_class}\n{code}", names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](**inputs).logits, model(**inputs).logits)


def test_card_of_a_trainer(trainer: LoRAProTrainer) -> None:
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    trainer.create_model_card(finetuned_from="someone/llama", license="mit", dataset="sums", dataset_tags="me/sums")
    card = ModelCard.load(folder / "README.md")
    assert card_problems(card.content) == []
    data, text = card.data, card.text
    assert data.base_model == "someone/llama" and data.to_dict()["library_name"] == "peft" and data.license == "mit"
    assert data.pipeline_tag == "text-generation" and data.datasets == ["me/sums"]
    expected = {"lora-pro", "lora", "peft", "transformers", "generated_from_trainer"}
    assert expected | {"base_model:adapter:someone/llama"} == set(data.tags)
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name, result.metric_type) == ("me/sums", "sums", "loss")
    assert result.metric_value == trainer.state.log_history[-2]["eval_loss"]
    assert text.count("# run\n") == 1 and "![Loss against step](training_curves.png)" in text
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    for row in (
        "| mode | factored |", "| update | linear (sylvester) |", "| trust region | 0.03 of the weight |",
        "| rank r | 4 |", "| alpha | 8 |", "| DoRA | no |",
        "| pairs of factors | 14 |", "| learning rate | 0.01 |", "| trained parameters | 3,968 |",
    ):  # fmt: skip
        assert row in text
    assert "weight decay 0.1" in text and "LoRAProAdamW" in text and "adamw_torch" not in text
    assert "`q_proj` (2)" in text and text.count("- PEFT ") == 1 and "wang2025lorapro" in text
    assert 'from_pretrained("someone/llama")' in text
    trainer.save_model()
    assert ModelCard.load(folder / "README.md").content == card.content


def test_settings_travel_with_the_adapter(trainer: LoRAProTrainer) -> None:
    trainer.save_model()
    run = Path(trainer.args.output_dir)
    for folder in (run, run / "checkpoint-1"):
        content = json.loads((folder / "lorapro_config.json").read_text())
        assert content["learning_rate"] == 0.01 and content["betas"] == [0.9, 0.999]
        assert load_lora_pro_config(folder) == LoRAProConfig(mode="factored", update="linear", trust_region=0.03)
    assert "lora-pro" in ModelCard.load(run / "checkpoint-1" / "README.md").data.tags


def test_off_is_the_parent(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, lora_pro=False)
    trainer.save_model()
    trainer.create_model_card()
    assert not (tmp_path / "lorapro_config.json").exists()
    assert "LoRA-Pro" not in (tmp_path / "README.md").read_text()
    assert "lora-pro" not in ModelCard.load(tmp_path / "README.md").data.tags


def test_methods_are_told_of_without_lora_pro_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "draw_curves", lambda *_: False)
    settings = {"beamlora_every": 2, "flat_lora_sigma": 0.05, "max_steps": 4}
    cards = []
    for is_on in (True, False):
        trainer = trainer_in(tmp_path / str(is_on), lora_pro=is_on, **settings)
        trainer.train()
        for _ in range(2):  # PEFT, which saves a plain adapter, leaves the card replaceable
            trainer.save_model()
            trainer.create_model_card()
        cards.append((tmp_path / str(is_on) / "README.md").read_text())
    with_lora_pro, card = cards
    assert heard(caplog) == [] and "LoRA-Pro" in with_lora_pro and "LoRA-Pro" not in card
    rows = set(re.findall(r"^\| .*", with_lora_pro.partition("### Hyperparameters")[2], re.MULTILINE))
    assert {row for row in rows if not re.match(r"\| (optimizer|learning rate) ", row)} <= set(card.splitlines())
    assert "| BeamLoRA | every=2," in card and re.search(r"^\| optimizer \| .*adamw", card, re.MULTILINE | re.I)
    assert "lora-pro" not in ModelCard.load(tmp_path / "False" / "README.md").data.tags


def test_text_of_the_user_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, file = trainer_in(tmp_path), tmp_path / "README.md"
    trainer.save_model()
    trainer.create_model_card(license="mit")
    trainer.create_model_card()
    assert heard(caplog) == [] and ModelCard.load(file).data.license == "mit"
    edited = file.read_text().replace("## Use it", "## Limits\n\nIt cannot swim.\n\n## Use it")
    file.write_text(edited)
    trainer.save_model()
    assert heard(caplog) == []
    trainer.create_model_card()
    (warning,) = heard(caplog)
    assert f"{file} was edited by hand" in warning and "rename or delete it" in warning
    trainer.is_in_train = True  # where the same warning is not repeated
    trainer.create_model_card()
    trainer.create_model_card()
    assert len(heard(caplog)) == 1 and file.read_text() == edited
    file.unlink()
    trainer.create_model_card()
    assert "LoRA-Pro" in file.read_text()


def test_metadata_of_the_user_is_kept(tmp_path: Path) -> None:
    model, file = tiny_lora(), tmp_path / "README.md"
    create_model_card(model, None, tmp_path)
    file.write_text(file.read_text().replace("---\n", "---\nlicense: apache-2.0\nthumbnail: x.png\n", 1))
    data = create_model_card(model, None, tmp_path, language="en").data
    assert (data.license, data.thumbnail, data.language) == ("apache-2.0", "x.png", "en")


def test_card_of_another_program_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# By hand\n")
    with pytest.raises(FileExistsError, match=r"README\.md was edited by hand or written by another program"):
        create_model_card(tiny_lora(), None, tmp_path)
    assert file.read_text() == "# By hand\n"


def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    card = create_model_card(tiny_lora(), None, tmp_path, log_history=log)
    assert "training_curves" not in card.text and not (tmp_path / "training_curves.png").exists()
    (warning,) = heard(caplog)
    assert "pip install matplotlib" in warning


def test_curves() -> None:
    log = [
        {"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 1.0, "eval_b_loss": 4.0}, {"step": 3, "loss": 1.5}, {"step": 3, "train_loss": 9.0},
    ]  # fmt: skip
    assert loss_curves(log) == {"loss": [(1, 2.0), (3, 1.5)], "eval_loss": [(1, 3.0)], "eval_b_loss": [(3, 4.0)]}


@pytest.mark.parametrize("count", [0, 1])
def test_no_curve_no_picture(count: int, tmp_path: Path) -> None:
    assert not draw_curves([{"step": 1, "loss": 1.0}] * count, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


LOG = [
    {"step": 1, "loss": 4.0, "epoch": 0.5},
    {"step": 2, "eval_loss": 1.0, "eval_accuracy": 0.9, "eval_runtime": 3.0, "epoch": 1.0},
    {"step": 4, "eval_loss": 2.0, "eval_accuracy": 0.5, "epoch": 2.0},
]
END = [{"step": 4, "train_runtime": 1.0}]


@pytest.mark.parametrize(
    ("log", "best_step", "metrics"),
    [
        (LOG + END, None, {"loss": 2.0, "accuracy": 0.5}),
        (LOG + END, 2, {"loss": 1.0, "accuracy": 0.9}),  # the best weights have been loaded
        (LOG, 2, {"loss": 2.0, "accuracy": 0.5}),  # not yet: the training goes on
        ([*LOG, *END, {"step": 4, "eval_a_loss": 5.0}, {"step": 4, "eval_b_loss": 6.0}], 2, {"a_loss": 5, "b_loss": 6}),
        (LOG[:1] + END, None, {}),
    ],
)
def test_metrics_are_of_the_saved_weights(log: list[Any], best_step: int | None, metrics: dict[str, float]) -> None:
    assert final_evaluation(log, best_step) == metrics


def test_course_of_the_training() -> None:
    assert evaluations_by_step(LOG)[0] == {
        "step": 2, "epoch": 1.0, "training loss": 4.0, "loss": 1.0, "accuracy": 0.9
    }  # fmt: skip


def test_long_tables_are_thinned_out(tmp_path: Path) -> None:
    log = [{"step": step, "eval_loss": 1.0} for step in range(1, 101)]
    text = create_model_card(tiny_lora(), None, tmp_path, log_history=log).text
    assert "20 of the 100 evaluations" in text and len(re.findall(r"^\| \d+ \| 1 \|$", text, re.M)) == 20


def test_values_that_are_no_numbers_stay_out_of_the_metadata(tmp_path: Path) -> None:
    card = create_model_card(tiny_lora(), None, tmp_path, metrics={"loss": float("nan"), "accuracy": 0.25})
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"] and "| loss | nan |" in card.text


def test_dataset_remembers_its_name() -> None:
    data = Dataset.from_dict({"x": [1]})
    assert dataset_names(data) == dataset_names([1]) == []
    data.info.download_checksums = {"hf://datasets/someone/sums@abc/train.parquet": {}, "https://x.org/y": {}}
    assert dataset_names(data) == ["someone/sums"]


def test_other_libraries_keep_their_say() -> None:
    text = (
        "It was trained.\n\n[<img src='x' width='150'/>](https://runs/1) \n\nThis model was trained with DPO, a method "
        "introduced in [A Title](https://x).\n\n## Citations\n\nCite DPO as:\n\n```bibtex\n@a{b}\n```\n\nCite TRL as:\n"
        "    \n```bibtex\n@c{d}\n```\n"
    )
    found = _markdown_of_parent(text)
    assert found["badges"] == ["[<img src='x' width='150'/>](https://runs/1)"]
    assert len(found["sentences"]) == 1 and [each[:8] for each in found["citations"]] == ["Cite DPO", "Cite TRL"]


def test_card_of_a_trl_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from lorapro_hf import LoRAProTrainerMixin

    class Trainer(LoRAProTrainerMixin, trl.SFTTrainer):
        pass

    model, data = model_of(tmp_path / "base"), Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"]})
    args = arguments(tmp_path / "run", trl.SFTConfig, bf16=False)
    trainer = Trainer(model, args, train_dataset=data, processing_class=tokenizer())
    trainer.create_model_card(model_name="sums", dataset_name="me/sums", tags="mine")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card_problems(card.content) == []
    assert {"trl", "sft", "lora-pro", "lora", "peft", "mine", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.to_dict()["library_name"] == "peft" and card.data.datasets == ["me/sums"]
    assert "[TRL](https://github.com/huggingface/trl)'s SFT" in card.text and "vonwerra20" in card.text
    assert "- TRL " in card.text and "AutoTokenizer.from_pretrained(adapter)" in card.text and "None" not in card.text


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "damaged"), ("[]", "damaged"), ("{}", "damaged"), ('{"lorapro_hf_version": "9", "new": 1}', "lorapro_hf 9")],
)
def test_damaged_settings(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "lorapro_config.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        load_lora_pro_config(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no lorapro_config\.json"):
        load_lora_pro_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="save the adapter there first"):
        create_model_card(tiny_lora(), None, tmp_path / "none")
    for act in (save_adapter, create_model_card):
        with pytest.raises(TypeError, match="unwrap_model"):
            act(torch.nn.Linear(2, 2), None, tmp_path)
    with pytest.raises(TypeError, match="unwrap_model"):
        push_adapter(torch.nn.Linear(2, 2), None, "me/x", tmp_path)


def test_adapter_of_another_name(tmp_path: Path) -> None:
    model = tiny_lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    save_adapter(model, create_lorapro_optimizer(model, lr=1e-3), tmp_path)
    text = create_model_card(model, None, tmp_path).text
    assert (tmp_path / "second" / "adapter_config.json").exists()
    assert 'subfolder="second"' in text and "| rank r | 2 |" in text


def test_empty_form_of_peft_is_replaced(tmp_path: Path) -> None:
    tiny_lora().save_pretrained(tmp_path)
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    assert "LoRA-Pro" in create_model_card(tiny_lora(), None, tmp_path).text
    (tmp_path / "README.md").unlink()
    tiny_lora().save_pretrained(tmp_path)
    form = (tmp_path / "README.md").read_text().replace("[More Information Needed]", "Me", 1)
    (tmp_path / "README.md").write_text(form)
    with pytest.raises(FileExistsError):
        create_model_card(tiny_lora(), None, tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456, "0.1235"), (1.5, "1.5"), (2.0, "2"), (1e-5, "1e-05"), (0.0, "0"), (7, "7")]
)
def test_numbers_of_tables(value: float, shown: str) -> None:
    assert number(value) == shown


def test_stream_without_length(tmp_path: Path) -> None:
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in sequences(4)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    args = arguments(tmp_path, LoRAProTrainingArguments)
    trainer = LoRAProTrainer(tiny_lora(), args, train_dataset=stream)
    trainer.create_model_card()
    assert re.search(r"LoRA-Pro\]\([^)]*\)\.\n", (tmp_path / "README.md").read_text())
