"""LoRAProTrainingArguments: from Python, from the command line, from files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from lorapro_hf import LoRAProConfig, LoRAProTrainingArguments
from trainer_helpers import PlainArgsTrainer, arguments, build


def parse(*words: str, cls: type = LoRAProTrainingArguments) -> LoRAProTrainingArguments:
    return HfArgumentParser(cls).parse_args_into_dataclasses([*words])[0]


def test_defaults_are_those_of_the_config():
    args = LoRAProTrainingArguments(output_dir="unused")
    assert args.lora_pro is True
    assert args.lora_pro_config == LoRAProConfig()


def test_command_line():
    args = parse(
        *("--output_dir", "unused", "--learning_rate", "1e-3", "--lora_pro_mode", "efficient"),
        *("--lora_pro_x_mode", "zero", "--lora_pro_update", "linear", "--lora_pro_rtol", "1e-5"),
        *("--lora_pro_efficient_projected", "true"),
    )
    assert args.lora_pro is True
    settings = {"x_mode": "zero", "update": "linear", "rtol": 1e-5, "efficient_projected": True}
    assert args.lora_pro_config == LoRAProConfig(mode="efficient", **settings)
    assert args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("words", "expected"), [((), True), (("--no_lora_pro",), False), (("--lora_pro", "false"), False)]
)
def test_flag(words: tuple[str, ...], expected: bool):
    assert parse("--output_dir", "unused", *words).lora_pro is expected


def test_command_line_lists_the_valid_modes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--output_dir", "unused", "--lora_pro_mode", "fast")
    message = capsys.readouterr().err
    assert "--lora_pro_mode" in message and "full" in message and "efficient" in message


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    for name in ("lora_pro", "no_lora_pro", "lora_pro_mode", "lora_pro_x_mode", "lora_pro_update", "lora_pro_rtol"):
        assert f"--{name} " in shown


def test_yaml_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    # without a dot YAML takes 1e-6 for text
    path.write_text(f"output_dir: {tmp_path}\nlora_pro_mode: efficient\nlora_pro_rtol: 1e-6\n")
    (args,) = HfArgumentParser(LoRAProTrainingArguments).parse_yaml_file(str(path))
    assert args.lora_pro_config == LoRAProConfig(mode="efficient", rtol=1e-6)


def test_json_round_trip(tmp_path):
    args = LoRAProTrainingArguments(output_dir=str(tmp_path), lora_pro=False, lora_pro_x_mode="symmetric")
    settings, mode = json.loads(args.to_json_string()), LoRAProConfig().mode
    expected = {"lora_pro": False, "lora_pro_mode": mode, "lora_pro_x_mode": "symmetric", "lora_pro_rtol": None}
    assert expected.items() <= settings.items()
    assert expected.items() <= args.to_dict().items()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"output_dir": str(tmp_path), **expected}))
    (again,) = HfArgumentParser(LoRAProTrainingArguments).parse_json_file(str(path))
    assert again.lora_pro is False and again.lora_pro_config == args.lora_pro_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_pro_mode": "fast"},
            "lora_pro_mode='fast' is unknown; valid values are 'full', 'full_8bit', 'factored', 'spectral', 'rite', ",
        ),
        (
            {"lora_pro_x_mode": "one"},
            "lora_pro_x_mode='one' is unknown; valid values are 'sylvester', 'zero', 'symmetric'",
        ),
        (
            {"lora_pro_update": "none"},
            "lora_pro_update='none' is unknown; valid values are 'linear', 'sequential'",
        ),
        ({"lora_pro_rtol": 1.5}, r"rtol=1.5 must be a number in \[0, 1\)"),
        ({"lora_pro_rtol": "small"}, r"lora_pro_rtol='small' must be a number"),
        ({"lora_pro_trust_region": 3}, "trust_region=3.0 must be a fraction below 1"),
        ({"flat_lora_sigma": True}, "flat_lora_sigma=True must be a number, or be left out"),
        ({"lora_pro_rite_clip": "much"}, "lora_pro_rite_clip='much' must be a number, or be left out"),
        (
            {"lora_pro_mode": "full", "lora_pro_rite_skip": 2.0},
            "mode 'full' does not know it, so rite_skip=2.0 has no meaning.*mode 'rite'",
        ),
        ({"lora_pro_rite_escape": "no"}, "lora_pro_rite_escape='no' must be true or false"),
        (
            {"lora_pro_mode": "full", "lora_pro_spectral_iterations": 3},
            "mode 'full' does not know it, so spectral_iterations=3",
        ),
        ({"lora_pro": "false"}, "lora_pro=.false. must be true or false"),
        ({"lora_pro_mode": "fast", "lora_pro": False}, "lora_pro_mode='fast' is unknown"),
    ],
)
def test_bad_values(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoRAProTrainingArguments(output_dir="unused", **settings)


def test_settings_of_the_modes_from_the_command_line():
    words = ("--output_dir", "unused", "--lora_pro_mode")
    rite = parse(*words, "rite", "--lora_pro_rite_clip", "0.5", "--lora_pro_rite_skip", "0", "--lora_pro_rite_escape")
    assert rite.lora_pro_config == LoRAProConfig(mode="rite", rite_clip=0.5, rite_skip=0.0, rite_escape=True)
    spectral = parse(*words, "spectral", "--lora_pro_spectral_iterations", "3")
    assert spectral.lora_pro_config == LoRAProConfig(mode="spectral", spectral_iterations=3)


# ---- max_grad_norm, which mode rite cannot take ----


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "max_grad_norm" in record.getMessage()]


@dataclass
class OtherDefault(LoRAProTrainingArguments):
    max_grad_norm: float = field(default=0.3)


def test_the_default_of_max_grad_norm_is_settled_with_one_warning(caplog, monkeypatch):
    args = LoRAProTrainingArguments(output_dir="unused", lora_pro_mode="rite")
    assert args.max_grad_norm == 0
    assert warnings_of(caplog) == [
        "max_grad_norm is 0 instead of its default 1, since mode 'rite' has limits of its own."
    ]
    caplog.clear()
    silent = [{"lora_pro_mode": "rite", "max_grad_norm": 0.0}, {"lora_pro_mode": "rite", "lora_pro": False}, {}]
    found = [LoRAProTrainingArguments(output_dir="unused", **settings).max_grad_norm for settings in silent]
    assert found == [0.0, 1.0, 1.0] and not warnings_of(caplog)
    monkeypatch.setenv("RANK", "1")  # rank 0 tells
    assert OtherDefault(output_dir="unused", lora_pro_mode="rite").max_grad_norm == 0 and not warnings_of(caplog)


def test_another_max_grad_norm_is_refused():
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 clips the raw gradients.*'rite'.*Set max_grad_norm=0"):
        LoRAProTrainingArguments(output_dir="unused", lora_pro_mode="rite", max_grad_norm=0.5)


def test_arguments_of_transformers_are_settled_by_the_trainer(tmp_path, caplog):
    trainer = build(PlainArgsTrainer, arguments(tmp_path), lora_pro_config={"mode": "rite"})
    assert trainer.args.max_grad_norm == 0 and len(warnings_of(caplog)) == 1
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 clips the raw gradients"):
        build(PlainArgsTrainer, arguments(tmp_path, max_grad_norm=0.5), lora_pro_config={"mode": "rite"})


@dataclass
class OtherTrainingArguments(TrainingArguments):
    learning_rate: float = field(default=2e-5)
    max_length: int = field(default=1024)


def test_beside_the_arguments_of_another_trainer():
    @dataclass
    class Both(OtherTrainingArguments, LoRAProTrainingArguments):
        pass

    args = parse("--output_dir", "unused", "--lora_pro_mode", "efficient", cls=Both)
    assert (args.learning_rate, args.max_length, args.lora_pro_mode) == (2e-5, 1024, "efficient")
    with pytest.raises(ValueError, match="lora_pro_mode"):
        Both(output_dir="unused", lora_pro_mode="fast")


def test_each_setting_of_the_config_is_said_once():
    stated = {setting.name: setting for setting in fields(LoRAProConfig)}
    own = {setting.name: setting for setting in fields(LoRAProTrainingArguments)}
    for name, setting in stated.items():
        told = {key: value for key, value in setting.metadata.items() if key != "mode"}
        assert setting.metadata["help"] and own[f"lora_pro_{name}"].metadata == told
        assert own[f"lora_pro_{name}"].default == setting.default
        assert LoRAProTrainingArguments.__annotations__[f"lora_pro_{name}"] == LoRAProConfig.__annotations__[name]


def test_bf16_without_a_gpu_for_it_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=r"bf16=True needs a GPU .* Set use_cpu=True \(--use_cpu\).*--bf16 false"):
        LoRAProTrainingArguments(str(tmp_path), bf16=True)
