"""Which model is trained, and with which adapter?"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.hub import sought
from lorapro_hf.recipes.targets import require_known_names

DTYPES = ("auto", "float32", "bfloat16", "float16")
_PATTERN = re.compile(r"[*+?()\[\]|\\^$]")  # what tells a regular expression from a name
_OF_NEW_ADAPTERS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
}
_INITS = ("true", "false", "gaussian", "orthogonal", "olora", "pissa")


@dataclass
class ModelArguments:
    """The base model: a name on the Hub or a local folder."""

    model_name_or_path: str = field(metadata={"help": "Base model: a name on the Hub or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer or processor, if not the model's own."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file of the model's folder to load and dequantize (extra 'demo')."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads go."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Read it before you set this."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the base model; by default the checkpoint's (under transformers 4 float32).",
            "choices": list(DTYPES),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: eager, sdpa, flash_attention_2, ..."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model to 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base model to 8 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "The kind of 4 bits.", "choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of 4 bits as well."})

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
class ModelArgumentsWithTRL(ModelArguments):
    """The same beside a configuration of TRL, which has a flag `trust_remote_code` of its own."""

    trust_remote_code: bool = field(default=False, init=False)

    def agree_with(self, training: Any) -> None:
        """Take over what TRL's configuration says."""
        self.trust_remote_code = bool(getattr(training, "trust_remote_code", False))


@dataclass
class AdapterArguments:
    """The LoRA adapter, by the names that TRL uses."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Go on with, or evaluate, this adapter of the Hub or of a folder instead of a new one."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "Names of the layers to adapt, all-linear (all but the head), or one regular expression that whole "
            "names match, such as '.*language_model.*_proj'."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that belong to no layer of their own (packed experts)."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers to train whole. Heads that a task adds are among them by themselves."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed adapter (DoRA)."})
    init_lora_weights: str = field(
        default="true",
        metadata={"help": "Start of the factors: true (B = 0), gaussian, orthogonal, olora, pissa."},
    )

    def __post_init__(self) -> None:
        name = self.init_lora_weights = str(self.init_lora_weights).lower()
        if name.startswith("pissa_niter"):  # PEFT starts it anew when it loads the adapter, at random
            raise UsageError(f"init_lora_weights={name!r}: nobody could load the adapter exactly; take pissa instead.")
        if name not in _INITS:
            raise UsageError(
                f"init_lora_weights={name!r} must be one of {', '.join(_INITS)}. Others (eva, corda, lora_ga, loftq) "
                "need data or a second model first: prepare the adapter in a script of your own."
            )

    def lora_config(self, task_type: str | None) -> LoraConfig:
        """The adapter as PEFT takes it.

        Args:
            task_type: PEFT's name of the task, such as `"CAUSAL_LM"`, or `None`.
        """
        targets = self.lora_target_modules
        is_pattern = len(targets) == 1 and _PATTERN.search(targets[0]) is not None
        init = {"true": True, "false": False}.get(self.init_lora_weights, self.init_lora_weights)
        # only where it is set: older versions of PEFT do not know it
        packed = {"target_parameters": self.lora_target_parameters} if self.lora_target_parameters else {}
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets[0] if is_pattern or targets == ["all-linear"] else targets,
            modules_to_save=list(self.lora_modules_to_save) if self.lora_modules_to_save else None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=init,
            task_type=task_type,
            **packed,
        )


def load_model(auto_class: Any, arguments: ModelArguments, **kwargs: Any) -> Any:
    """The base model, quantized if asked for.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        arguments: which one.
        **kwargs: passed on to `from_pretrained` (`config`, `num_labels`, ...).
    """
    if arguments.config_name is not None and "config" not in kwargs:
        with sought("the configuration", arguments.config_name):
            config, unused = AutoConfig.from_pretrained(
                arguments.config_name, return_unused_kwargs=True, **arguments.hub_kwargs, **kwargs
            )
        kwargs = {**unused, "config": config}
    kwargs = {**arguments.hub_kwargs, **kwargs}
    if arguments.dtype is not None:
        kwargs["dtype"] = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    if arguments.gguf_file is not None:
        kwargs["gguf_file"] = arguments.gguf_file
    quantization = quantization_config(arguments)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    with sought("the model", arguments.model_name_or_path):
        return auto_class.from_pretrained(arguments.model_name_or_path, **kwargs)


def load_config(arguments: ModelArguments, **kwargs: Any) -> Any:
    """The configuration that the arguments name, or the model's own, changed as `kwargs` say."""
    source = arguments.config_name or arguments.model_name_or_path
    with sought("the configuration of the model", source):
        return AutoConfig.from_pretrained(source, **kwargs, **arguments.hub_kwargs)


def load_processor(auto_class: Any, source: str, arguments: ModelArguments) -> Any:
    """An image processor or feature extractor.

    Args:
        auto_class: such as `AutoImageProcessor`.
        source: a name on the Hub or a local folder.
        arguments: how the Hub is asked.
    """
    with sought("the processor of the model", source):
        return auto_class.from_pretrained(source, **arguments.hub_kwargs)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or the model's own."""
    own = arguments.tokenizer_name is None
    gguf = {"gguf_file": arguments.gguf_file} if own and arguments.gguf_file is not None else {}
    source = arguments.model_name_or_path if own else arguments.tokenizer_name
    with sought("the tokenizer of the model", source):
        return AutoTokenizer.from_pretrained(source, **gguf, **arguments.hub_kwargs)


def quantization_config(arguments: ModelArguments) -> BitsAndBytesConfig | None:
    """What bitsandbytes is told, or `None` for a base model that is not quantized."""
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


def add_adapter(
    model: PreTrainedModel,
    arguments: AdapterArguments,
    task_type: str | None,
    gradient_checkpointing: bool = False,
    head: str | None = None,
    new_layers: Collection[str] = (),
) -> PeftModel:
    """The model with a new adapter, or the one that the arguments name, everything else frozen.

    Args:
        model: the base model, quantized or not.
        arguments: which adapter.
        task_type: PEFT's name of the task.
        gradient_checkpointing: whether the training will recompute activations, for which the inputs of the first
            layer need gradients.
        head: a layer that the task adds, to be trained whole; for tasks of which PEFT knows no name.
        new_layers: from `layers_without_weights`; trained whole too, since nobody could load them again otherwise.

    Raises:
        UsageError: the arguments name a layer or parameter that the model does not have.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    own = {"classifier", "score"} if task_type == "SEQ_CLS" else set()  # which PEFT trains by itself
    heads = {*new_layers, *own, head}
    if arguments.adapter_name_or_path is not None:
        return _with_wide_heads(continued_adapter(model, arguments), heads)
    config = arguments.lora_config(task_type)
    require_known_names(model, config)
    if head is not None:
        config.modules_to_save = [*(config.modules_to_save or []), head]
    new = sorted({*new_layers} - own)
    if new:
        config.modules_to_save = [*(config.modules_to_save or []), *new]
        config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, new))})(\..*)?"  # not for `all-linear` to adapt
    adapted = get_peft_model(model, config)
    targets = adapted.active_peft_config.target_modules
    if isinstance(targets, set) and head is not None:
        targets.discard(head)  # `all-linear` lists it, and then PEFT would save a head named lm_head twice
    return _with_wide_heads(adapted, heads)


def continued_adapter(model: PreTrainedModel, arguments: AdapterArguments) -> PeftModel:
    """The model with the adapter that the arguments name, ready to train on.

    Raises:
        UsageError: its folder has no weights, or the arguments ask for settings that this adapter does not have.
    """
    folder = Path(str(arguments.adapter_name_or_path))
    if (folder / "adapter_config.json").is_file() and not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UsageError(f"the adapter {folder} has no weights, {ADAPTER_FILES[0]}: save it again, or name another.")
    with sought("the adapter", arguments.adapter_name_or_path):
        adapted = PeftModel.from_pretrained(model, arguments.adapter_name_or_path, is_trainable=True)
    _require_own_settings(arguments, adapted.active_peft_config)
    return adapted


def _require_own_settings(arguments: AdapterArguments, has: Any) -> None:
    asked, default = arguments.lora_config(None), AdapterArguments().lora_config(None)
    for name, flag in _OF_NEW_ADAPTERS.items():
        wanted, usual, own = (_plain(getattr(config, name, None)) for config in (asked, default, has))
        if name == "modules_to_save":  # heads are among the adapter's own without being asked for
            own = wanted if set(wanted or ()) <= set(own or ()) else own
        if wanted not in (usual, own):
            raise UsageError(
                f"the adapter {arguments.adapter_name_or_path} has {name}={own!r}, which --{flag} "
                f"{' '.join(wanted) if isinstance(wanted, list) else wanted} cannot change; leave {flag} out of flags "
                "and recipe, or train a new adapter without --adapter_name_or_path."
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _with_wide_heads(model: PeftModel, names: Collection[str | None]) -> PeftModel:
    """Heads that are trained whole in float32, as PEFT has it for factors: in less, small steps are rounded away."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(f".{name}".endswith(f".{each}") for each in names):
            narrow = any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
            if narrow:
                module.modules_to_save.float()
                module.register_forward_pre_hook(_widen)
    return model


def _widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
