"""Which model is trained, and with which adapter?"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.adapter_files import PATTERNS, read_adapter_file
from lorapro_hf.recipes.endings import sought
from lorapro_hf.recipes.targets import require_known_names

_PATTERN = re.compile(r"[*+?()\[\]|\\^$]")  # characters of a regular expression that no name has
_INITS = ("true", "false", "gaussian", "orthogonal", "olora", "pissa")
# settings of a new adapter: PEFT's name and the flag
_FLAGS = {name: f"lora_{name}" for name in ("r", "target_modules", "target_parameters", "modules_to_save")}
_FLAGS |= {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")}


@dataclass
class ModelArguments:
    """The base model: a name on the Hub or a local folder."""

    model_name_or_path: str = HfArg(help="Base model: a name on the Hub or a local folder.")
    config_name: str | None = HfArg(default=None, help="Configuration, if not the model's own.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer or processor, if not the model's own.")
    gguf_file: str | None = HfArg(default=None, help="GGUF file of the model's folder to dequantize (extra 'demo').")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    token: str | None = HfArg(default=None, help="Token for the Hub, if not the one you logged in with.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model; read it first.")
    dtype: str | None = HfArg(
        default=None,
        help="Precision of the base model; by default the checkpoint's (under transformers 4 float32).",
        metadata={"choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = HfArg(default=None, help="Attention: eager, sdpa, flash_attention_2, ...")
    load_in_4bit: bool = HfArg(default=False, help="Quantize the base model to 4 bits (QLoRA).")
    load_in_8bit: bool = HfArg(default=False, help="Quantize the base model to 8 bits.")
    bnb_4bit_quant_type: str = HfArg(default="nf4", help="Type of the 4 bits.", metadata={"choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = HfArg(default=False, help="Quantize the scales of 4 bits as well.")

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError("load_in_4bit and load_in_8bit exclude each other.")

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Keywords for every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class AdapterArguments:
    """The LoRA adapter, by TRL's names."""

    adapter_name_or_path: str | None = HfArg(
        default=None, help="Adapter on the Hub or in a folder to continue or evaluate, instead of a new one."
    )
    lora_config: str | None = HfArg(
        default=None, help="JSON file with LoraConfig's settings, such as the ranks that `lorapro ranks` has chosen."
    )
    lora_r: int = HfArg(default=8, help="Rank.")
    lora_alpha: float = HfArg(default=16, help="The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapter.")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["all-linear"],
        help="Names of layers, all-linear (all but the head), or one regular expression such as '.*model.*_proj'.",
    )
    lora_target_parameters: list[str] | None = HfArg(default=None, help="Parameters to adapt, such as packed experts.")
    lora_modules_to_save: list[str] | None = HfArg(default=None, help="Layers to train whole, besides a task's head.")
    use_rslora: bool = HfArg(default=False, help="Scale by lora_alpha / sqrt(lora_r) (rsLoRA).")
    use_dora: bool = HfArg(default=False, help="Weight-decomposed adapter (DoRA).")
    init_lora_weights: str = HfArg(default="true", help="Start: true (B = 0), gaussian, orthogonal, olora, pissa.")

    def __post_init__(self) -> None:
        self._patterns: dict[str, Any] = {}
        if self.lora_config is not None:
            self._take_file(self.lora_config)
        name = self.init_lora_weights = str(self.init_lora_weights).lower()
        if name.startswith("pissa_niter"):  # PEFT repeats its random start when it loads the adapter
            raise UsageError(f"init_lora_weights={name!r}: nobody could load the adapter exactly; take pissa instead.")
        if name not in _INITS:
            raise UsageError(
                f"init_lora_weights={name!r} must be one of {', '.join(_INITS)}. Others (eva, corda, lora_ga, loftq) "
                "need data or a second model first: prepare the adapter in a script of your own."
            )

    def _take_file(self, path: str) -> None:
        """Take the settings of `lora_config`, and refuse flags that contradict them."""
        if self.adapter_name_or_path is not None:
            raise UsageError(
                f"--lora_config is for a new adapter, and {self.adapter_name_or_path} has settings of its own: leave "
                "out --lora_config or --adapter_name_or_path."
            )
        content = read_adapter_file(path)
        self._patterns = {name: content[name] for name in PATTERNS if name in content}
        default = AdapterArguments()
        for name in _FLAGS.keys() & content.keys():
            flag, own = _FLAGS[name], content[name]
            own = [own] if isinstance(own, str) and name == "target_modules" else own
            own = str(own).lower() if name == "init_lora_weights" else own
            given = getattr(self, flag)
            if _sorted(given) not in (_sorted(getattr(default, flag)), _sorted(own)):
                raise UsageError(
                    f"{path} has {name}={own!r}, which --{flag} {given} contradicts: give --{flag} that value (flags "
                    f"win over a recipe), leave {flag} out of flags and recipe (a recipe that extends another one "
                    f"removes it by `{flag}: null`), or change the file."
                )
            setattr(self, flag, own)

    def peft_config(self, task_type: str | None) -> LoraConfig:
        """Return PEFT's configuration of the adapter, for PEFT's name of a task such as `"CAUSAL_LM"`."""
        settings = {name: getattr(self, flag) for name, flag in _FLAGS.items()}
        settings["modules_to_save"] = list(self.lora_modules_to_save or ()) or None  # PEFT appends heads to it
        if self.init_lora_weights in ("true", "false"):
            settings["init_lora_weights"] = self.init_lora_weights == "true"
        targets = self.lora_target_modules
        if targets == ["all-linear"] or (len(targets) == 1 and _PATTERN.search(targets[0])):
            settings["target_modules"] = targets[0]
        return LoraConfig(**settings, **self._patterns, task_type=task_type)


def load_model(auto_class: Any, arguments: ModelArguments, **kwargs: Any) -> Any:
    """Return the base model, quantized if asked for; `kwargs` are more keywords for `from_pretrained`."""
    if arguments.config_name is not None and "config" not in kwargs:
        config, kwargs = load_config(arguments, return_unused_kwargs=True, **kwargs)
        kwargs["config"] = config
    if arguments.dtype is not None:
        kwargs["dtype"] = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    quantization: Any = quantization_config(arguments)
    if arguments.gguf_file is not None and quantization is None and hasattr(transformers, "GgufConfig"):
        # newer versions may keep the weights packed, and the Trainer refuses such a model
        quantization = transformers.GgufConfig(dequantize=True)
    optional = {
        "attn_implementation": arguments.attn_implementation,
        "gguf_file": arguments.gguf_file,
        "quantization_config": quantization,
    }
    kwargs |= {name: value for name, value in optional.items() if value is not None}
    return _load("model", auto_class, arguments.model_name_or_path, arguments, **kwargs)


def load_config(arguments: ModelArguments, **kwargs: Any) -> Any:
    """Return the configuration that the arguments name, or the model's own, with `kwargs` set."""
    source = arguments.config_name or arguments.model_name_or_path
    return _load("configuration of the model", AutoConfig, source, arguments, **kwargs)


def load_processor(auto_class: Any, source: str, arguments: ModelArguments) -> Any:
    """Return an image processor or feature extractor."""
    return _load("processor of the model", auto_class, source, arguments)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the arguments name, or the model's own."""
    source, kwargs = arguments.tokenizer_name, {}
    if source is None:
        source = arguments.model_name_or_path
        kwargs = {} if arguments.gguf_file is None else {"gguf_file": arguments.gguf_file}
    tokenizer: PreTrainedTokenizerBase = _load("tokenizer of the model", AutoTokenizer, source, arguments, **kwargs)
    return tokenizer


def _load(kind: str, auto_class: Any, source: str, arguments: ModelArguments, **kwargs: Any) -> Any:
    with sought(f"the {kind}", source):
        return auto_class.from_pretrained(source, **{**arguments.hub_kwargs, **kwargs})


def quantization_config(arguments: ModelArguments) -> BitsAndBytesConfig | None:
    """Return the settings for bitsandbytes, or `None` for a base model that is not quantized."""
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return None
    dtype = arguments.dtype if arguments.dtype not in (None, "auto") else "bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        bnb_4bit_compute_dtype=getattr(torch, str(dtype)),
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
    )


def layers_without_weights(model: PreTrainedModel, missing_keys: Collection[str]) -> set[str]:
    """Return the layers that start at random: heads, and layers between the base model and the head."""
    prefix = f"{model.base_model_prefix}."
    inside = {key.rpartition(".")[0] for key in missing_keys if key.startswith(prefix)}
    return inside | {key.partition(".")[0] for key in missing_keys if not key.startswith(prefix)}


def add_adapter(
    model: PreTrainedModel,
    arguments: AdapterArguments,
    task_type: str | None,
    gradient_checkpointing: bool = False,
    head: str | None = None,
    new_layers: Collection[str] = (),
) -> PeftModel:
    """Return the frozen model, quantized or not, with a new adapter or with the adapter that the arguments name.

    Args:
        model: The base model.
        arguments: The settings of the adapter.
        task_type: PEFT's name of the task.
        gradient_checkpointing: Whether the training recomputes activations, which requires inputs with gradients.
        head: The layer that the task adds, to be trained whole, for tasks without a name in PEFT.
        new_layers: Layers from `layers_without_weights`, trained whole so that the adapter has their weights.

    Raises:
        UsageError: if the arguments name a layer or parameter that the model does not have.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    heads = {*new_layers, *([head] if head else [])}
    heads_of_peft = {"classifier", "score"} if task_type == "SEQ_CLS" else set()
    if arguments.adapter_name_or_path is not None:
        return _with_wide_heads(continued_adapter(model, arguments), heads | heads_of_peft)
    config = arguments.peft_config(task_type)
    require_known_names(model, config)
    new = sorted({*new_layers} - heads_of_peft)
    added = [*([head] if head else []), *new]
    if added:
        config.modules_to_save = [*(config.modules_to_save or []), *added]
    if new:  # `all-linear` must not adapt them
        config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, new))})(\..*)?"
    adapted = get_peft_model(model, config)
    targets = adapted.active_peft_config.target_modules
    if isinstance(targets, set) and head is not None:
        targets.discard(head)  # `all-linear` lists it, and PEFT would save a head named lm_head twice
    return _with_wide_heads(adapted, heads | heads_of_peft)


def continued_adapter(model: PreTrainedModel, arguments: AdapterArguments) -> PeftModel:
    """Return the model with the adapter that the arguments name, ready to be trained.

    Raises:
        UsageError: if the folder has no weights, or the arguments contradict the adapter's own settings.
    """
    source = str(arguments.adapter_name_or_path)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UsageError(f"the adapter {folder} has no weights, {ADAPTER_FILES[0]}: save it again, or name another.")
    with sought("the adapter", source):
        adapted = PeftModel.from_pretrained(model, source, is_trainable=True)
    configs = (arguments.peft_config(None), AdapterArguments().peft_config(None), adapted.active_peft_config)
    for name, flag in _FLAGS.items():
        wanted, default, own = (_sorted(getattr(config, name, None)) for config in configs)
        if name == "modules_to_save" and set(wanted or ()) <= set(own or ()):  # `own` also has heads
            continue
        if wanted not in (default, own):
            raise UsageError(
                f"the adapter {source} has {name}={own!r}, which --{flag} "
                f"{' '.join(wanted) if isinstance(wanted, list) else wanted} cannot change; leave {flag} out of flags "
                "and recipe, or train a new adapter without --adapter_name_or_path."
            )
    return adapted


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _with_wide_heads(model: PeftModel, heads: Collection[str]) -> PeftModel:
    """Return the model with its heads in float32, as PEFT does with factors: bfloat16 would round small steps away."""
    for name, module in model.named_modules():
        is_head = isinstance(module, ModulesToSaveWrapper) and any(f".{name}".endswith(f".{head}") for head in heads)
        narrow = (p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16))
        if is_head and any(p.requires_grad for p in narrow):
            module.modules_to_save.float()
            module.register_forward_pre_hook(_widen)
    return model


def _widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
