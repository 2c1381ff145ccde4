"""`lorapro inspect` and `inspect_model`: what they say of models and adapters is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_layers import DEFAULTS, Net
from lorapro_hf import LoRAProConfig, cli, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.commands.inspect import costs, inspect_model
from lorapro_hf.commands.inspect.costs import learning_rates, shares_of
from lorapro_hf.commands.inspect.report import Request
from lorapro_hf.commands.inspect.show import _aligned, text
from lorapro_hf.commands.inspect.sources import inspect_source
from lorapro_hf.factors.pairs import survey_lora_pairs
from lorapro_hf.optim.rules import RULES
from lorapro_hf.options import UsageError
from support_models import merged, token_ids, two_adapters, with_frozen_A
from trainer_helpers import tiny_lora

HEADS = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**HEADS, "vocab_size": 64, "num_key_value_heads": 2, "dtype": "bfloat16"}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", {**HEADS, "image_size": 16, "patch_size": 8}),
    "mixtral": (
        "MixtralForCausalLM",
        {**HEADS, "vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 3},
    ),
}
KEYS = {
    "source base adapters pairs pair_count pair_parameters ordinary ordinary_parameters unsupported costs ranks memory "
    "loaded settings checkpoint checkpoints notes is_trainable lorapro_hf": "report",
    "model_class name parameters dtype bytes quantization": "base",
    "name kind layers active trainable merged rank alpha targets options": "adapters",
    "kind m n r batch scaling dtype pairs count": "pairs",
    "mode moments_dtype state_bytes scratch_bytes total_bytes fits learning_rates": "costs",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the five, with nothing but a configuration in it."""
    root = tmp_path_factory.mktemp("models")
    for name, (architecture, settings) in CONFIGS.items():
        config = AutoConfig.for_model(name, **settings)
        config.architectures = [architecture]
        config.save_pretrained(root / name)
    return root


def built(folder: Path, **lora: Any) -> nn.Module:
    """The model of a folder with values, and an adapter."""
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    model.name_or_path = str(folder)
    return get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PACKED = int(transformers.__version__.split(".")[0]) >= 5  # before, Mixtral's experts were layers of their own
WISHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"use_rslora": True, "lora_r": 4}, {"use_rslora": True, "r": 4, "task_type": "CAUSAL_LM"}),
    "gpt2": ({}, {"task_type": "CAUSAL_LM"}),
    "t5": ({"use_dora": True}, {"use_dora": True, "task_type": "SEQ_2_SEQ_LM"}),
    "vit": ({"lora_alpha": 3.0}, {"lora_alpha": 3.0, "modules_to_save": ["classifier"]}),
    "mixtral": (
        {"lora_target_parameters": EXPERTS} if PACKED else {},
        {"target_parameters": EXPERTS if PACKED else None, "task_type": "CAUSAL_LM"},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("gpt2", "t5") else ()) for name in CONFIGS],
)
def test_the_model_of_a_configuration_has_the_pairs_of_the_real_one(models: Path, name: str):
    wish, lora = WISHES[name]
    report = inspect_source(Request(str(models / name), wish))
    real = built(models / name, **lora)
    pairs = find_lora_pairs(real)
    found = {key: (group.scaling, group.r, group.batch) for group in report.pairs for key in group.pairs}
    assert {key: scaling for key, (scaling, _, _) in found.items()} == {pair.name: pair.scaling for pair in pairs}
    assert {key: r * batch for key, (_, r, batch) in found.items()} == {pair.name: pair.shape_A[0] for pair in pairs}
    factors = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = [p for p in real.parameters() if p.requires_grad and id(p) not in factors]
    assert sum(each.parameters for each in report.ordinary) == sum(p.numel() for p in others)
    assert bool(others) == (name in ("t5", "vit"))
    assert report.pair_parameters == sum(pair.A.numel() + pair.B.numel() for pair in pairs)
    base = report.base
    assert base is not None and base.model_class == CONFIGS[name][0] and not report.loaded
    trained = report.pair_parameters + sum(p.numel() for p in others if name == "t5")
    assert base.parameters == sum(p.numel() for p in real.parameters()) - trained - (99 - 33 if name == "vit" else 0)
    assert base.dtype == ("bfloat16" if name == "llama" else "float32")
    assert report.is_trainable
    if name == "mixtral":
        assert {group.batch for group in report.pairs} == ({1, 3} if PACKED else {1})


@pytest.mark.parametrize("mode", ["full", "factored", "efficient"])
def test_state_is_what_an_optimizer_keeps(mode: str):
    model = tiny_lora()
    report = inspect_model(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-3, config=LoRAProConfig(mode=mode))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    (cost,) = [each for each in report.costs if each.mode == mode and each.moments_dtype == "float32"]
    assert cost.state_bytes == sum(value.numel() * value.element_size() for value in kept)
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert report.loaded and cost.total_bytes == cost.state_bytes + cost.scratch_bytes + gradients


def test_ranks_share_pairs_out(models: Path):
    alone, shared = (inspect_source(Request(str(models / "llama"), ranks=ranks)) for ranks in (1, 2))
    for one, two in zip(alone.costs, shared.costs, strict=True):
        assert 0.5 * one.state_bytes <= two.state_bytes < 0.6 * one.state_bytes
    pairs = find_lora_pairs(tiny_lora())
    own = shares_of(pairs, 3)
    assert sorted(pair.name for share in own for pair in share) == sorted(pair.name for pair in pairs)


def test_weights_that_are_to_be_loaded_count(models: Path):
    report = inspect_source(Request(str(models / "llama")))
    assert report.base is not None and report.base.bytes is not None
    assert report.base.bytes == 2 * (report.base.parameters or 0)
    for cost in report.costs:
        assert cost.total_bytes is not None and cost.fits
        assert (
            cost.total_bytes
            == cost.state_bytes + cost.scratch_bytes + report.base.bytes + 2 * 4 * report.pair_parameters
        )


@pytest.mark.parametrize("free", [0, None])
def test_memory_that_is_not_there(models: Path, monkeypatch: pytest.MonkeyPatch, free: int | None):
    monkeypatch.setattr(costs, "available_bytes", lambda place: free)
    report = inspect_source(Request(str(models / "llama")))
    assert {cost.fits for cost in report.costs} == {None if free is None else False}
    assert list(report.memory.values()) == [free]


def test_weights_of_a_quantized_configuration_are_not_guessed(models: Path, tmp_path: Path):
    content = json.loads((models / "llama" / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    report = inspect_source(Request(str(tmp_path)))
    assert report.base is not None and report.base.quantization == "4 bits (bitsandbytes, nf4)"
    assert report.base.bytes is None and {cost.total_bytes for cost in report.costs} == {None}
    assert {cost.fits for cost in report.costs} == {None}


def test_learning_rates_fall_with_size_but_for_efficient():
    large, medium, small = (learning_rates(RULES["full"], count) for count in (7_000_000_000, 2_000_000_000, 135))
    assert large < medium < small
    low, high = learning_rates(RULES["factored"], 7_000_000_000)
    assert low < 2e-5 < high
    assert learning_rates(RULES["efficient"], 135) == learning_rates(RULES["efficient"], 7_000_000_000)


# What is refused


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(4, 4) for _ in range(4))


def test_all_refusals_are_told_not_only_the_first():
    model = get_peft_model(
        Three(), LoraConfig(**{**DEFAULTS, "target_modules": ["first", "second", "third", "fourth"]})
    )
    body = model.base_model.model
    body.first.lora_A.requires_grad_(False)
    body.second.lora_A.requires_grad_(False)
    body.third.scaling["default"] = 0.0
    report = inspect_model(model)
    assert [(each.kind, each.layers) for each in report.unsupported] == [
        ("Linear", ["base_model.model.first", "base_model.model.second"]),
        ("Linear", ["base_model.model.third"]),
    ]
    assert "Make both trainable" in report.unsupported[0].reason and "Set lora_alpha" in report.unsupported[1].reason
    assert [name for group in report.pairs for name in group.pairs if group.scaling] == ["base_model.model.fourth"]
    assert not report.ordinary and not report.is_trainable
    _, refusals = survey_lora_pairs(model)
    with pytest.raises(ValueError, match="lora_A of adapter 'default' is frozen") as raised:
        find_lora_pairs(model)
    assert str(raised.value) == str(refusals[0].error)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_frozen_A, "lora_A of adapter 'default' is frozen"),
        (merged, "is merged into the base weight"),
        (lambda model, config: model, "has no LoRA layer; wrap it first"),
        (
            lambda model, config: get_peft_model(model, IA3Config(target_modules=["body"], feedforward_modules=[])),
            "IA3",
        ),
    ],
)
def test_refusals_say_why(make: Any, reason: str):
    report = inspect_model(make(Net(nn.Linear(6, 6)), LoraConfig(**DEFAULTS)))
    assert len(report.unsupported) == 1 and reason.lower() in report.unsupported[0].reason.lower()
    assert not report.is_trainable and not report.costs
    assert reason.lower() in " ".join(text(report).lower().split())


def test_several_adapters():
    model = two_adapters(Net(nn.Linear(6, 6)), LoraConfig(**DEFAULTS))
    report = inspect_model(model)
    assert [(each.name, each.rank, each.active, each.trainable) for each in report.adapters] == [
        ("default", 3, True, True),
        ("other", 2, True, True),
    ]
    assert [group.pairs for group in report.pairs] == [
        ["base_model.model.body (default)"],
        ["base_model.model.body (other)"],
    ]
    model.set_adapter("other")
    assert [(each.active, each.trainable) for each in inspect_model(model).adapters] == [(False, False), (True, True)]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        inspect_model(nn.Linear(2, 2), ranks=0)
    with pytest.raises(TypeError, match="expected the model itself"):
        inspect_model([])  # type: ignore[arg-type]


# Adapters


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with experts, an embedding and ranks of its own, whose base is a folder."""
    folder = tmp_path_factory.mktemp("adapter")
    model = built(
        models / "mixtral",
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        target_parameters=EXPERTS if PACKED else None,
        rank_pattern={"q_proj": 6},
        task_type="CAUSAL_LM",
    )
    model.save_pretrained(folder)
    return folder


def sizes(report: Any) -> set[tuple[float, ...]]:
    return {(group.count, group.batch, group.m, group.n, group.r, group.scaling) for group in report.pairs}


def copy_of(adapter: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def test_an_adapter_on_its_base(adapter: Path):
    report = inspect_source(Request(str(adapter)))
    assert report.is_trainable and not report.notes
    experts = {(2, 3, 96, 32, 4, 4.0), (2, 3, 32, 48, 4, 4.0)} if PACKED else set()
    assert sizes(report) == {(1, 1, 32, 64, 4, 4.0), (2, 1, 32, 32, 6, 16 / 6)} | experts
    assert report.base is not None and report.base.model_class == "MixtralForCausalLM"


def test_an_adapter_whose_base_is_not_there(adapter: Path, tmp_path: Path):
    for base, message in (
        ("./gone", r"needs its base model: .*\./gone.*into adapter_config\.json"),
        (None, "not name"),
    ):
        with pytest.raises(UsageError, match=f"(?s){message}"):
            inspect_source(Request(str(copy_of(adapter, tmp_path, base_model_name_or_path=base))))


def test_an_adapter_of_another_base_is_noticed(adapter: Path, models: Path, tmp_path: Path):
    other = copy_of(adapter, tmp_path, base_model_name_or_path=str(models / "llama"), target_modules=["q_proj"])
    notes = inspect_source(Request(str(other))).notes
    assert any("in the adapter's file belong to nothing in the model" in note for note in notes)


def test_an_adapter_takes_no_options_of_a_new_one(adapter: Path):
    with pytest.raises(UsageError, match="settings of its own: leave out --lora_r"):
        inspect_source(Request(str(adapter), {"lora_r": 4}))


def test_a_damaged_adapter(adapter: Path, tmp_path: Path):
    folder = copy_of(adapter, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UsageError, match="cut off or damaged"):
        inspect_source(Request(str(folder)))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read adapter_config\.json"):
        inspect_source(Request(str(folder)))


def test_an_adapter_of_another_kind(tmp_path: Path):
    get_peft_model(Net(nn.Linear(4, 4)), IA3Config(target_modules=["body"], feedforward_modules=[])).save_pretrained(
        tmp_path
    )
    with pytest.raises(UsageError, match="of the kind IA3, which has no LoRA factors"):
        inspect_source(Request(str(tmp_path)))


# The command


@pytest.mark.filterwarnings("ignore")
def test_json_has_the_keys_it_is_documented_to_have(models: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(models / "vit"), "--json", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(printed)
    assert printed.count("\n") == 1
    parts = {"report": content, "base": content["base"]}
    parts |= {name: content[name][0] for name in ("adapters", "pairs", "costs")}
    for keys, name in KEYS.items():
        assert set(keys.split()) == set(parts[name]), name
    assert content["ordinary"] == [
        {"name": "classifier.modules_to_save.default.weight", "tensors": 1, "parameters": 64},
        {"name": "classifier.modules_to_save.default.bias", "tensors": 1, "parameters": 2},
    ]
    assert content["ordinary_parameters"] == 66 and content["ranks"] == 2 and content["pair_count"] == 12


def test_every_pair_by_name(models: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(models / "gpt2"), "--pairs"]) == 0
    text = capsys.readouterr().out
    for block in range(2):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            assert f"  transformer.h.{block}.{name} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "there is no folder ./nowhere."),
        (["/a/b/c"], "there is no folder /a/b/c."),
        (["nosuch"], "cannot read the configuration of nosuch: there is no folder of that name here"),
        (["{root}"], "Did you mean {root}/gpt2, {root}/llama"),
        (["{root}/llama/config.json"], "is a file: name the folder it is in, {root}/llama."),
        (
            ["{root}/llama", "--lora_target_modules", "nope"],
            "has no nope. Its linear layers: q_proj, k",
        ),
        (["{root}/llama", "--lora_target_modules", "q_proj", "k_prj"], "has no k_prj (did you mean k_proj or"),
        (
            ["{root}/llama", "--target_parameters", "gate", "nope"],
            "LlamaForCausalLM has no gate, nope",
        ),
        (["{root}/llama", "--task", "ctc"], "cannot build {root}/llama for the task ctc"),
        (["{root}/llama", "--ranks", "0"], "'0' is not a whole number from 1 on"),
        (["{root}/llama", "--task", "chess"], "invalid choice: 'chess'"),
    ],
)
def test_wrong_use(models: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    words = [word.replace("{root}", str(models)) for word in words]
    try:
        code = cli.main(["inspect", *words])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("lorapro inspect: error: ") and message.replace("{root}", str(models)) in last


def test_a_configuration_without_architecture_needs_the_task(models: Path, tmp_path: Path):
    content = json.loads((models / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": None}))
    with pytest.raises(UsageError, match=r"which does not tell the task\. Add --task"):
        inspect_source(Request(str(tmp_path)))
    assert inspect_source(Request(str(tmp_path), task="sequence-classification")).ordinary


def test_every_task_has_its_class():
    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class)
    assert AutoModelForCausalLM.__name__ == TASKS["causal-lm"].auto_class


@pytest.mark.slow
def test_seventy_billion_parameters_need_no_weights(tmp_path: Path):
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    report = inspect_source(Request(str(tmp_path), {"lora_r": 16}))
    assert report.base is not None and report.base.parameters == 70_553_706_496
    assert report.pair_parameters == 207_093_760


def test_a_name_that_holds_the_separator_of_cells_stays_whole():
    assert _aligned("base model | a | b\nparameters | 1\n") == "  base model  a | b\n  parameters  1\n"
