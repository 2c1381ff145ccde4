"""LoRA-Pro in sentence-transformers' trainer, with an adapter from its `add_adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss, SoftmaxLoss
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

from lorapro_hf import LoRAProAdamW, LoRAProTrainerMixin, LoRAProTrainingArguments
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from trainer_helpers import arguments, assert_same, factors, logged

LETTERS = [chr(ord("a") + n) for n in range(26)]
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
loads_adapters = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="under transformers 4, sentence-transformers finds no processor in the folder of an adapter",
)


@dataclass
class Arguments(SentenceTransformerTrainingArguments, LoRAProTrainingArguments):
    pass


class LoRAProSentenceTransformerTrainer(LoRAProTrainerMixin, SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return str(folder)


def rows(**column: list[Any]) -> Dataset:
    return Dataset.from_dict({"one": LETTERS[:16], "other": LETTERS[10:], **column})


def trainer_of(base: str, folder: Path, own: bool = True, softmax: bool = False, **settings: Any) -> Any:
    """A trainer of six steps; sentence-transformers' own unless `own`."""
    set_seed(0)
    model = SentenceTransformer(base, device="cpu")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    data = rows(label=[n % 3 for n in range(16)]) if softmax else rows(score=[n / 16 for n in range(16)])
    args = arguments(folder, Arguments if own else SentenceTransformerTrainingArguments, **settings)
    return (LoRAProSentenceTransformerTrainer if own else SentenceTransformerTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        loss=SoftmaxLoss(model, 32, 3) if softmax else CosineSimilarityLoss(model),
    )


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted training, saved in the middle, at the end and after it."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(base, folder, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def embedded(model: SentenceTransformer) -> torch.Tensor:
    return model.eval().encode(LETTERS, convert_to_tensor=True, show_progress_bar=False)


def test_it_learns_with_lora_pro(whole: Any):
    assert isinstance(unwrap_optimizer(whole.optimizer), LoRAProAdamW)
    assert len(logged(whole, "lora_pro_grad_norm")) == 6


@loads_adapters
def test_resumes_to_the_bit(base: str, whole: Any, tmp_path: Path):
    resumed = trainer_of(base, tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert_same(factors(resumed), factors(whole))
    assert logged(resumed, "loss") == logged(whole, "loss")


@loads_adapters
def test_the_best_model_is_loaded(base: str, tmp_path: Path):
    # the least loss is that of the first evaluation, of which the parent's own metric is told to think so
    settings = {"metric_for_best_model": "eval_runtime_rank", "greater_is_better": True}
    trainer = trainer_of(base, tmp_path, save_strategy="steps", save_steps=3, **EVALUATING, **settings)
    evaluate, ranks = trainer.evaluate, iter([2.0, 1.0])
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_runtime_rank": next(ranks)}
    at_best: dict[str, torch.Tensor] = {}
    save = trainer._save_checkpoint

    def keep(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        at_best.update(at_best or factors(trainer))

    trainer._save_checkpoint = keep
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert_same(factors(trainer), at_best)


@loads_adapters
def test_sentence_transformers_loads_the_adapter(whole: Any):
    loaded = SentenceTransformer(whole.args.output_dir, device="cpu")
    torch.testing.assert_close(embedded(loaded), embedded(whole.model), rtol=0, atol=0)


def test_an_adapter_that_is_not_saved_is_named(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    inner = whole.model.transformers_model
    state = inner.get_adapter_state_dict()
    lost = next(name for name in state if "lora_B" in name)
    monkeypatch.setattr(inner, "get_adapter_state_dict", lambda *_, **__: {n: state[n] for n in state if n != lost})
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {lost} is missing there.* cannot be restored"):
        whole.save_model(str(tmp_path))
    monkeypatch.setattr(whole.model, "save_pretrained", lambda *_, **__: None)
    with pytest.raises(ValueError, match="empty has no file of an adapter or a model"):
        whole.save_model(str(tmp_path / "empty"))


def test_the_card_is_theirs_and_tells_of_lora_pro(whole: Any):
    folder = Path(whole.args.output_dir)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in ("library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "- lora-pro\n"):
        assert text in card
    assert "from sentence_transformers import SentenceTransformer" in card
    assert f"| mode | {whole.args.lora_pro_mode} |" in card and "| rank r | 4 |" in card
    assert (folder / "checkpoint-3" / "README.md").read_text(encoding="utf-8").count("## LoRA-Pro") == 1
    whole.create_model_card(tags="letters")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("## LoRA-Pro") == 1 and "- letters\n" in card
    assert not list(folder.glob("_README*"))


@loads_adapters
def test_turned_off_it_is_the_parent_to_the_bit(base: str, tmp_path: Path):
    trainers = [
        trainer_of(base, tmp_path / "alone", own=False, save_strategy="steps", save_steps=3),
        trainer_of(base, tmp_path / "off", lora_pro=False, save_strategy="steps", save_steps=3),
    ]
    for trainer in trainers:
        set_seed(0)
        trainer.train()
        trainer.create_model_card()
    assert_same(*map(factors, trainers))
    alone, off = ({p.relative_to(t.args.output_dir) for p in Path(t.args.output_dir).rglob("*")} for t in trainers)
    assert off == alone
    for trainer in trainers:
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert_same(*map(factors, trainers))


def test_weights_of_the_loss_are_trained_as_the_parent_trains_them(base: str, tmp_path: Path):
    classifiers = []
    for own in (True, False):
        trainer = trainer_of(base, tmp_path, own, softmax=True, max_steps=1)
        start = trainer.loss.classifier.weight.detach().clone()
        trainer.train()
        classifiers.append(trainer.loss.classifier.weight.detach())
        assert not torch.equal(start, classifiers[-1])
    torch.testing.assert_close(*classifiers)


def test_learning_rates_by_name_are_refused(base: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"learning_rate_mapping=.* would be ignored.*Leave learning_rate_mapping unset"
    ):
        trainer_of(base, tmp_path, learning_rate_mapping={"query": 1.0})
