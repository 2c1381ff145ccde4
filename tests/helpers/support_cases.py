"""Which layers, adapter settings and ways of training does LoRA-Pro handle? A case for each row of docs/support.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

import support_models as models
from lora_layers import ALL_ROWS, Net, tied_llama
from support_rows import Case, everywhere, language, linear, replaced, token_ids

# ---- layers ----

MAGNITUDE = ("the magnitudes", "lora_magnitude_vector")
ABOUT_LAYERS: dict[str, dict[str, Any]] = {
    "linear with DoRA": {"ordinary": MAGNITUDE},
    "embedding with DoRA": {"ordinary": MAGNITUDE},
    "Conv2d with DoRA": {"ordinary": MAGNITUDE},
    "linear with a bias on lora_B": {"ordinary": ("the bias on lora_B", "lora_B")},
    "linear with aLoRA": {"note": "The adapter is on from the invocation tokens on; the weight moves for those alone."},
    "Conv2d with groups": {"note": "Each group is a pair of its own."},
    "experts (in, out)": {"note": "`target_parameters`; each expert is a pair of its own."},
    "experts (out, in)": {"note": "`target_parameters`; each expert is a pair of its own."},
    "4-bit base": {"note": "bitsandbytes; the base stays as it is."},
    "8-bit base": {"note": "bitsandbytes; the base stays as it is."},
}
LAYERS = [replaced(row, **ABOUT_LAYERS.get(row.name, {})) for row in ALL_ROWS]


# ---- settings ----


SETTINGS = [
    Case(
        "rank_pattern and alpha_pattern",
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        {"target_modules": ["0", "2"], "rank_pattern": {"0": 2}, "alpha_pattern": {"2": 9}},
        pairs=2,
        note="Each layer has a rank and a scaling of its own.",
    ),
    language(
        "target_modules='all-linear' and exclude_modules",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        12,
    ),
    language("layers_to_transform and layers_pattern", {"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
    language(
        "layer_replication",
        {"layer_replication": [[0, 2], [1, 2]]},
        6,
        note="Each copy of a layer has a pair of its own.",
    ),
    language("modules_to_save", {"modules_to_save": ["lm_head"]}, ordinary=("the saved modules", "modules_to_save")),
    language(
        "trainable_token_indices",
        {"trainable_token_indices": [3, 5]},
        ordinary=("the rows of those tokens", "trainable_tokens_delta"),
    ),
    linear("bias='all' or 'lora_only'", {"bias": "all"}, ordinary=("the biases", "bias")),
    linear("lora_dropout", {"lora_dropout": 0.5}),
    Case(
        "ensure_weight_tying with tied embeddings",
        lambda: tied_llama().unload(),
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
        lambda: token_ids() % 23,
        dtype=torch.float32,  # a cast parts what is tied by memory
        note="Both layers are one pair, stepped once. Do not cast or move the model after the optimizer is built.",
        since="0.19",
    ),
    linear("several active adapters", how=models.two_adapters, pairs=2, note="Each is projected by itself."),
    linear(
        "an adapter chosen with set_adapter",
        how=models.with_second_adapter_active,
        note="Adapters that are not active stay as they are.",
    ),
]


# ---- initializations ----


CHANGES_BASE = (
    "It changes the base weight; `save_pretrained(..., path_initial_model_for_weight_conversion=...)` gives an adapter "
    "for the untouched base."
)
INITIALIZATIONS = [
    linear("True (B = 0)", {"init_lora_weights": True}, note="At B = 0 the first step moves B alone."),
    linear("'gaussian'", {"init_lora_weights": "gaussian"}),
    linear("'orthogonal'", {"init_lora_weights": "orthogonal", "r": 2}, how=models.made_in_double),
    linear("'pissa'", {"init_lora_weights": "pissa"}, reload="converted", note=CHANGES_BASE),
    linear("'pissa_niter_4'", {"init_lora_weights": "pissa_niter_4"}, reload="converted", note=CHANGES_BASE),
    linear("'olora'", {"init_lora_weights": "olora"}, reload="converted", note=CHANGES_BASE),
    linear(
        "'corda'",
        {"init_lora_weights": "corda", "corda_config": lambda: peft.tuners.lora.config.CordaConfig()},
        how=models.corda,
        reload="converted",
        note=CHANGES_BASE,
    ),
    linear(
        "'lora_ga'",
        {"r": 2, "init_lora_weights": "lora_ga", "lora_ga_config": lambda: peft.LoraGAConfig()},
        how=models.lora_ga,
        reload="converted",
        note=CHANGES_BASE,
    ),
    language(
        "'eva'",
        {"init_lora_weights": "eva", "eva_config": lambda: peft.EvaConfig(rho=1.0)},
        how=models.eva,
        dtype=torch.float32,
    ),
    Case(
        "'loftq'",
        lambda: Net(nn.Linear(16, 16)),
        {"init_lora_weights": "loftq", "loftq_config": lambda: peft.LoftQConfig(loftq_bits=8)},
        lambda: torch.randn(9, 16),
        dtype=torch.float32,
        how=models.loftq,
        reload="",
        note="PEFT computes it on CUDA, also for loading, which is not tried here.",
    ),
    linear(
        "'mica'",
        {"init_lora_weights": "mica"},
        refused=everywhere(
            r"body: lora_B of adapter 'default' is frozen.*LoRA-Pro moves both. Make both trainable, or train"
        ),
        note="It freezes B; LoRA-Pro moves both factors.",
        since="0.21",
    ),
]

# ---- what computes more than the product of two factors ----

VARIANT = r"{} computes more than scaling \* B @ A. Leave it out of target_modules .*plain optimizer"
NO_PRODUCT = "Its layers compute something else than the product of two factors."


def variant(name: str, kind: str, settings: dict[str, Any], note: str, **more: Any) -> Case:
    return linear(name, settings, refused=everywhere(VARIANT.format(kind)), note=note, **more)


VARIANTS = [
    variant(
        "kasa_config",
        "KasaLinearVariant",
        {"kasa_config": lambda: peft.KasaConfig()},
        "It trains a diagonal between the factors.",
    ),
    variant(
        "use_bdlora",
        "BdLoraLinearVariant",
        {"use_bdlora": lambda: peft.BdLoraConfig(target_modules_bd_a=["body"], nblocks=2, match_strict=False), "r": 2},
        "One of the factors is block-diagonal.",
    ),
    variant(
        "velora_config",
        "VeloraLinearVariant",
        {"velora_config": lambda: peft.VeloraConfig(num_groups=2)},
        "Its backward pass approximates the gradient of A.",
    ),
    variant(
        "monteclora_config",
        "MontecloraLinearVariant",
        {"monteclora_config": lambda: peft.MontecloraConfig()},
        "It adds random, learned perturbations to the factors.",
    ),
    variant(
        "use_qalora on a GPTQ base",
        "QALoraLinearVariant",
        {"use_qalora": True, "qalora_group_size": 2},
        "It pools the inputs before A. PEFT ignores the setting on other bases.",
        how=models.qalora,
    ),
    replaced(
        language("arrow_config", {"arrow_config": lambda: peft.ArrowConfig()}),
        how=models.arrow,
        refused=everywhere(VARIANT.format("ArrowLinearVariant")),
        note="It routes between trained adapters.",
    ),
]

NOTHING_TRAINABLE = r"no active LoRA adapter is trainable .*is_trainable=True.*set_adapter.*enable_adapter_layers"
STATES = [
    linear(
        "inference_mode", {"inference_mode": True}, refused=everywhere(NOTHING_TRAINABLE), note="Nothing is trainable."
    ),
    linear("disabled", how=models.disabled, refused=everywhere(NOTHING_TRAINABLE), note="Nothing is trainable."),
    linear(
        "merged",
        how=models.merged,
        refused=everywhere(r"adapter 'default' is merged .*unmerge_adapter"),
        note="The factors get no gradient.",
    ),
    linear(
        "one frozen factor",
        how=models.with_frozen_A,
        refused=everywhere(r"lora_A of adapter 'default' is frozen.*Make both trainable"),
        note="LoRA-Pro moves both.",
    ),
    linear(
        "lora_alpha = 0",
        {"lora_alpha": 0},
        refused=everywhere(r"scaling of adapter 'default' is 0.*lora_alpha"),
        note="Such factors cannot move the weight.",
    ),
]


def method(
    name: str,
    config: Callable[[], peft.PeftConfig],
    pattern: str = r"\['peft.tuners.{}.*'\] but no LoRA layer.*LoraConfig",
) -> Case:
    how = lambda model, _: peft.get_peft_model(model, config())  # noqa: E731
    refused = everywhere(pattern.format(name.lower()))
    return replaced(language(name), how=how, refused=refused, note=NO_PRODUCT)


Q = {"target_modules": ["q_proj"]}
METHODS = [
    method("LoHa", lambda: peft.LoHaConfig(**Q)),
    method("LoKr", lambda: peft.LoKrConfig(**Q)),
    method(
        "AdaLoRA",
        lambda: peft.AdaLoraConfig(**Q, total_step=10),
        r"q_proj \(SVDLinear\).*its lora_A is a Parameter.*plain optimizer",
    ),
    method("IA3", lambda: peft.IA3Config(**Q, feedforward_modules=[])),
    method("OFT", lambda: peft.OFTConfig(**Q, oft_block_size=4)),
    method("VeRA", lambda: peft.VeraConfig(**Q)),
    replaced(
        method(
            "Prompt tuning",
            lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "has no LoRA layer; wrap it first.*get_peft_model",
        ),
        note="It has no factors.",
    ),
    replaced(
        language("X-LoRA", pairs=8),
        how=partial(models.x_lora, use_trainable_adapters=True),
        dtype=torch.float32,
        ordinary=("the classifier", "internal_xlora_classifier"),
        reload="",
        note="With `use_trainable_adapters=True`. Loading is not tried.",
    ),
    replaced(
        language("X-LoRA with frozen adapters"),
        how=models.x_lora,
        refused=everywhere(NOTHING_TRAINABLE),
        note="The factors are frozen; only the classifier is trained.",
    ),
    replaced(
        language("X-LoRA with global_scaling_weight"),
        how=partial(models.x_lora, use_trainable_adapters=True, global_scaling_weight=2.0),
        refused=everywhere("global_scaling_weight is 2.*Set it to 1"),
        note="It scales the adapters behind LoRA's own scaling.",
    ),
]

# ---- how the model is trained ----

WAYS = [
    language("gradient checkpointing", how=models.checkpointed),
    language("torch.compile", how=models.compiled),
    language(
        "bf16 autocast",
        dtype=torch.float32,
        within=lambda: torch.autocast("cpu", torch.bfloat16),
        note="The factors and their steps stay in float32.",
    ),
    language(
        "factors in bf16",
        how=models.narrow,
        dtype=torch.bfloat16,
        lr=1e-2,
        note="Steps below half a unit in the last place are lost; see *master_factors*.",
    ),
    language(
        "factors in bf16 with master_factors",
        how=models.narrow,
        dtype=torch.bfloat16,
        lr=1e-2,
        config={"master_factors": True},
        refused={"callback": "LoRAProCallback cannot keep master_factors.*LoRAProAdamW"},
        note="The steps are taken in float32. The callback steps nothing itself and cannot keep them.",
    ),
]

GROUPS = {
    "Layers": LAYERS,
    "Settings of LoraConfig": SETTINGS,
    "init_lora_weights": INITIALIZATIONS,
    "Variants of LoRA": VARIANTS,
    "Adapters that cannot be trained as they are": STATES,
    "Other PEFT methods": METHODS,
    "Ways of training": WAYS,
}
CASES = [case for cases in GROUPS.values() for case in cases]

# Fields of LoraConfig without a row of their own, and why.
OTHER_FIELDS = {
    "task_type": "tells PEFT which class to wrap the model in",
    "peft_type": "is always LORA",
    "auto_mapping": "is written by PEFT for loading",
    "peft_version": "is written by PEFT for loading",
    "base_model_name_or_path": "is written by PEFT for loading",
    "revision": "is written by PEFT for loading",
    "runtime_config": "says where DoRA is initialized",
    "megatron_config": "needs Megatron-LM, which LoRA-Pro refuses",
    "megatron_core": "needs Megatron-LM, which LoRA-Pro refuses",
}
