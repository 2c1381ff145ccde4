"""Every recipe has a twin on tiny inputs, fits its script, and its twin trains to an adapter that stock PEFT loads.

Then what the scripts make of models, labels and metrics that are less plain than those of the recipes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    EvalPrediction,
)

from lorapro_hf.cli import build_parser
from lorapro_hf.recipes.metrics import of_labels
from lorapro_hf.recipes.model import ModelArguments, load_model
from lorapro_hf.recipes.parser import EXTENDS, SCRIPT, RecipeParser, read_recipe
from script_helpers import CONFIGS, INPUTS, SCRIPTS, TINY, check_adapter, factors, results, script

SMOKE = CONFIGS / "smoke"
NO_RECIPES = {"accelerate", "compare", "smoke"}
SMALLER = {
    *("model_name_or_path", "output_dir", "use_cpu", "report_to", "disable_tqdm", "logging_steps", "max_steps"),
    *("dataset_name", "dataset_config_name", "train_file", "train_dir", "validation_split_percentage"),
    *("max_train_samples", "max_eval_samples", "max_length", "max_source_length", "lora_r", "lora_config"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("dataloader_num_workers", "booster_steps", "beamlora_every"),
    *("reward_funcs", "num_generations", "max_completion_length"),
}
BY_DEFAULT = "smollm2-135m.yaml"


def recipes_in(folder: Path) -> list[str]:
    """Recipes by their paths in the folder; files whose names begin with _ are shared by recipes."""
    found = (path.relative_to(folder) for path in folder.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.as_posix() for path in found if folder == SMOKE or path.parts[0] not in NO_RECIPES)


RECIPES = recipes_in(CONFIGS)
OTHERS_SLOW = [pytest.param(name, marks=[] if name == BY_DEFAULT else pytest.mark.slow) for name in RECIPES]


class Parsed(Exception):
    """Ends a script once its settings are read."""


def test_every_recipe_has_a_twin_and_every_twin_a_recipe() -> None:
    assert len(RECIPES) > 20
    assert recipes_in(SMOKE) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_twin_changes_model_data_sizes_and_steps_alone(name: str) -> None:
    own = yaml.safe_load((SMOKE / name).read_text())
    assert ((SMOKE / name).parent / own[EXTENDS][0]).resolve() == CONFIGS / name
    recipe, twin = read_recipe(CONFIGS / name), read_recipe(SMOKE / name)
    changed = {key for key in recipe.keys() | twin.keys() if recipe.get(key) != twin.get(key)}
    assert changed <= SMALLER
    assert {"model_name_or_path", "output_dir", "max_steps"} <= changed


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_opens_with_its_launch_line_and_one_override(name: str) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    comment = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")]]
    assert f"lorapro train {name}" in comment
    overrides = [line for line in comment if line.startswith("lorapro train") and name in line and line.count("--")]
    assert len(overrides) == 1
    assert any(line.startswith("Figures: ") for line in comment)
    for line in comment:
        if "lorapro evaluate" in line:
            arguments = build_parser().parse_args(shlex.split(line[line.index("lorapro ") :])[1:])
            assert arguments.adapter == read_recipe(CONFIGS / name)["output_dir"]


@pytest.mark.parametrize("name", OTHERS_SLOW)
def test_settings_parse_and_the_override_of_the_comment_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = RecipeParser.parse
    read: list[Any] = []

    def parse_only(parser: RecipeParser, argv: list[str]) -> None:
        read.append(parse(parser, argv))
        raise Parsed

    monkeypatch.setattr(RecipeParser, "parse", parse_only)
    program = script(read_recipe(CONFIGS / name)[SCRIPT])
    ranks = read_recipe(CONFIGS / name).get("lora_config")
    if ranks is not None:  # its comment says how to make the file
        monkeypatch.chdir(tmp_path)
        (tmp_path / ranks).write_text('{"r": 4}')
    line = next(x for x in (CONFIGS / name).read_text().splitlines() if f"{name} --" in x)
    override = line.partition(name)[2].split()
    for more in ([], override):
        # a CPU has no bf16 of its own, and says so already when settings are read
        with pytest.raises(Parsed):
            program.main([str(CONFIGS / name), "--use_cpu", *more])
    model, adapter, _data, training = read[0]
    settings = read_recipe(CONFIGS / name)
    assert model.model_name_or_path == settings["model_name_or_path"]
    assert adapter.lora_target_modules == settings["lora_target_modules"]
    assert training.learning_rate == pytest.approx(settings["learning_rate"])
    assert training.lora_pro_mode == settings["lora_pro_mode"]
    # the arguments of the training are no plain data: some of theirs are made anew each time
    assert any(repr(before) != repr(after) for before, after in zip(*read, strict=True))


@pytest.mark.parametrize("name", OTHERS_SLOW)
def test_twin_trains(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    program = read_recipe(SMOKE / name)[SCRIPT]
    assert (SCRIPTS / program).is_file()
    script(program).main([str(SMOKE / name), "--output_dir", str(tmp_path / "out")])
    found = results(tmp_path / "out")
    # the loss of GRPO is the mean of advantages
    assert found["train_loss"] > 0 or program == "run_grpo.py"
    settings = read_recipe(SMOKE / name)
    assert ("eval_loss" in found) == bool(settings.get("do_eval"))
    assert (tmp_path / "out" / "README.md").is_file()
    check_adapter(tmp_path / "out", program)


@pytest.mark.slow
def test_a_start_alone_makes_an_adapter_that_trains_as_the_start_does(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a start under engines that refuse it, as their message says."""
    monkeypatch.chdir(inputs)
    main, start = script("run_sft.py").main, tmp_path / "start"
    words = [str(SMOKE / "smollm2-135m-lora-one.yaml"), "--do_eval", "false", "--lora_pro_init_samples", "4"]
    main([*words, "--output_dir", str(tmp_path / "whole")])
    main([*words, "--max_steps", "0", "--num_train_epochs", "0", "--output_dir", str(start)])
    words = [str(SMOKE / "smollm2-135m.yaml"), "--do_eval", "false", "--adapter_name_or_path", str(start)]
    main([*words, "--output_dir", str(tmp_path / "continued")])
    whole, continued = factors(tmp_path / "whole"), factors(tmp_path / "continued")
    assert all(torch.equal(values, continued[name]) for name, values in whole.items())


LLAMA, DATA = f"{INPUTS}/models/llama", f"{INPUTS}/data"
SST2 = ["--train_file", f"{DATA}/sst2.jsonl", "--validation_file", f"{DATA}/sst2.jsonl", "--do_eval"]
SIZES = {"vocab_size": 260, "pad_token_id": 0}


def base_without_heads(kind: str, folder: Path) -> str:
    """A checkpoint that has none of the layers between model and label."""
    if kind == "t5":
        return f"{INPUTS}/models/t5"
    torch.manual_seed(0)
    if kind == "distilbert":  # `pre_classifier`
        model: Any = DistilBertModel(DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=2, **SIZES))
    else:  # `bert.pooler`
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertModel(BertConfig(**SIZES, **small), add_pooling_layer=False)
    model.save_pretrained(folder)
    script("make_smoke_inputs.py").byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["distilbert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "t5"))]
)
def test_layers_that_start_at_random_are_in_the_adapter(
    kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    words = ["--model_name_or_path", base_without_heads(kind, tmp_path / "base"), *SST2, *TINY]
    main, trained, judged = script("run_glue.py").main, tmp_path / "trained", tmp_path / "judged"
    # with a test set: the encoder's states come with the logits of some models
    main([*words, "--do_train", "--do_predict", "--test_file", f"{DATA}/sst2.jsonl", "--output_dir", str(trained)])
    # with another seed they would start as others
    main([*words, "--adapter_name_or_path", str(trained), "--seed", "7", "--output_dir", str(judged)])
    assert results(judged)["eval_loss"] == pytest.approx(results(trained)["eval_loss"], rel=1e-6)
    assert len((trained / "predictions.txt").read_text().splitlines()) == 25
    assert not [name for name in factors(trained) if "lora" in name and "class" in name]


@pytest.mark.parametrize("more", [[], pytest.param(["--bf16"], marks=pytest.mark.slow)], ids=["plain", "autocast"])
def test_heads_of_narrow_models_learn(
    more: list[str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    words = ["--model_name_or_path", LLAMA, *SST2, *TINY, "--dtype", "bfloat16", *more, "--do_train"]
    script("run_glue.py").main([*words, "--learning_rate", "1e-6", "--output_dir", str(tmp_path)])
    (head,) = (values for name, values in factors(tmp_path).items() if "score" in name)
    assert head.dtype == torch.float32
    # what bfloat16 could not hold
    assert not torch.equal(head, head.bfloat16().float())


def test_a_configuration_of_another_folder_is_used(inputs: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = inputs / LLAMA
    AutoConfig.from_pretrained(model, rms_norm_eps=0.25).save_pretrained(tmp_path)
    loaded = load_model(AutoModelForCausalLM, ModelArguments(str(model), config_name=str(tmp_path)))
    assert loaded.config.rms_norm_eps == 0.25


def test_splits_of_mnli_may_be_chosen() -> None:
    data = script("run_glue.py").GlueArguments
    plain, chosen = data(task_name="mnli"), data(task_name="mnli", validation_split="validation_mismatched")
    assert (plain.validation_split, plain.test_split) == ("validation_matched", "test_matched")
    assert (chosen.validation_split, chosen.test_split) == ("validation_mismatched", "test_matched")


@pytest.mark.parametrize("metric", ["accuracy_and_f1", "mse"])
def test_metrics_that_fit_no_labels_are_refused(
    metric: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps({"text": f"{n}", "label": n % 3}) for n in range(6)))
    words = ["--model_name_or_path", LLAMA, "--train_file", str(tmp_path / "three.jsonl"), *TINY, "--do_train"]
    with pytest.raises(SystemExit):
        script("run_glue.py").main([*words, "--metric_for_labels", metric, "--output_dir", str(tmp_path)])
    assert f"the metric {metric} does not fit labels that are 3 classes" in capsys.readouterr().err


def test_two_metrics_have_a_combined_score() -> None:
    logits = np.eye(2)[[1, 1, 0, 0]]
    found = of_labels("accuracy_and_f1")(EvalPrediction((logits, np.zeros((4, 3))), np.array([1, 0, 0, 0])))
    assert found == {"accuracy": 0.75, "f1": pytest.approx(2 / 3), "combined_score": pytest.approx((0.75 + 2 / 3) / 2)}


def test_hidden_labels_have_no_text(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(json.dumps({"sentence": f"What is {n}?", "label": -1}) for n in range(3)))
    words = [str(SMOKE / "paper" / "t5-base-sst2.yaml"), "--test_file", str(test), "--do_predict"]
    words += ["--do_train", "false", "--do_eval", "false", "--output_dir", str(tmp_path / "out")]
    script("run_seq2seq.py").main(words)
    assert "predict_exact_match" not in results(tmp_path / "out")
    assert len((tmp_path / "out" / "predictions.txt").read_text().splitlines()) == 3
    texts = script("run_seq2seq.py").texts_of
    data = script("run_seq2seq.py").TextPairArguments(train_file="x.csv", label_texts=["no", "yes"])
    assert texts(data, ["a", "label"])({"a": "x", "label": 1}) == ("x", "yes")
    with pytest.raises(ValueError, match="none for the label 2"):
        texts(data, ["a", "label"])({"a": "x", "label": 2})
    with pytest.raises(ValueError, match="'good' in the column label is no number of a label"):
        texts(data, ["a", "label"])({"a": "x", "label": "good"})


def test_an_unknown_language_is_refused() -> None:
    module = script("run_seq2seq.py")
    data = module.TextPairArguments(train_file="x.json", source_lang="en_XX", target_lang="ro")
    with pytest.raises(ValueError, match=r"must be among \['en', 'ro'\]"):
        module.columns_of(data, ["translation.en", "translation.ro"])


class Stop(Exception):
    """Ends a script once it has a trainer."""


@pytest.fixture
def keywords_of_trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that runs a script without its training, and returns the keywords of its trainer."""

    def run(program: str, words: list[str]) -> dict[str, Any]:
        module, seen = script(program), {}

        def trainer(*_: Any, **keywords: Any) -> None:
            seen.update(keywords)
            raise Stop

        monkeypatch.setattr(module, "LoRAProTrainer", trainer)
        with pytest.raises(Stop):
            module.main([*words, *TINY, "--do_train"])
        return seen

    return run


def test_recordings_of_different_lengths_are_held_against_all_their_words(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keywords_of_trainer: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.chdir(inputs)
    words = ["--model_name_or_path", f"{INPUTS}/models/wav2vec2", "--train_file", f"{DATA}/speech/train.jsonl"]
    keywords = keywords_of_trainer("run_speech_recognition.py", [*words, "--output_dir", str(tmp_path)])
    letters = json.loads((tmp_path / "vocab.json").read_text())
    spelled = [[letters[each] for each in word] for word in ("low", "high")]
    padded = np.array([[*tokens, *[-100] * (6 - len(tokens))] for tokens in spelled])
    assert keywords["compute_metrics"](EvalPrediction(padded, padded)) == {"wer": 0.0}


def test_models_without_a_table_of_positions_take_blocks_of_any_length(
    tmp_path: Path, keywords_of_trainer: Callable[..., dict[str, Any]]
) -> None:
    base = tmp_path / "base"
    BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, **SIZES)).save_pretrained(base)
    script("make_smoke_inputs.py").byte_tokenizer().save_pretrained(base)
    settings = base / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"model_max_length": 256', '"model_max_length": 4096'))
    (tmp_path / "text.txt").write_text("some words " * 1000)
    words = ["--model_name_or_path", str(base), "--train_file", str(tmp_path / "text.txt"), "--block_size", "1100"]
    keywords = keywords_of_trainer("run_clm.py", [*words, "--output_dir", str(tmp_path / "out")])
    assert len(keywords["train_dataset"]) == 10


@pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="these versions always unpack")
def test_weights_of_a_gguf_file_are_unpacked_as_the_trainer_needs_them() -> None:
    class Loader:
        @staticmethod
        def from_pretrained(_source: str, **kwargs: Any) -> Any:
            return kwargs

    kwargs = load_model(Loader, ModelArguments("folder", gguf_file="x.gguf"))
    assert kwargs["gguf_file"] == "x.gguf" and kwargs["quantization_config"].dequantize
