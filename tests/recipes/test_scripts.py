"""The programs of scripts/: what they refuse and in what words, what they leave, and how they go on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lorapro_hf import LoRAProTrainer
from script_helpers import INPUTS, QUIET, TINY, check_adapter, factors, results, script

LLAMA, DATA = f"{INPUTS}/models/llama", f"{INPUTS}/data"
GLUE = ["--model_name_or_path", LLAMA, "--max_seq_length", "32"]
SST2 = [*GLUE, "--train_file", f"{DATA}/sst2.jsonl", "--validation_file", f"{DATA}/sst2.jsonl"]
CLM = ["--model_name_or_path", LLAMA, "--train_file", f"{DATA}/text.txt", "--block_size", "16"]
SFT = ["--model_name_or_path", LLAMA, "--train_file", f"{DATA}/messages.jsonl", "--max_length", "64"]
PORJ = ["--lora_target_modules", "v_proj", "q_porj"]
SPEECH = ["--model_name_or_path", f"{INPUTS}/models/wav2vec2", "--train_file", f"{DATA}/speech/train.jsonl"]
IMAGES = ["--model_name_or_path", f"{INPUTS}/models/vit", "--train_dir", f"{DATA}/images"]


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_inputs(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a program says on stderr before it ends with exit code 2."""

    def run(program: str, *words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            script(program).main([*words, "--output_dir", str(tmp_path / "out"), *QUIET])
        assert caught.value.code == 2
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("run_glue.py", [*SST2], "there is nothing to do: set --do_train, --do_eval or --do_predict"),
        ("run_glue.py", [*SST2, "--lora_rank", "8"], "--lora_rank is no option of run_glue.py; did you mean"),
        (
            "run_glue.py",
            [*SST2, "--gradient_clip", "1"],
            "--gradient_clip is no option of run_glue.py; --max_grad_norm",
        ),
        ("run_glue.py", [*GLUE, "--dataset_name", __file__], "is a file: name it by --train_file"),
        ("run_glue.py", [*SST2, "--xyz=3"], "--xyz=3 is no option of run_glue.py; --help lists them"),
        ("run_glue.py", [*GLUE, "--do_train"], "name the data: --dataset_name, or --train_file and --validation_file"),
        ("run_glue.py", [*GLUE, "--train_file", "no.csv", "--do_train"], "--train_file no.csv: there is no such file"),
        ("run_glue.py", [*GLUE, "--train_file", "a.xls", "--do_train"], "must end with one of .csv, .json, .jsonl"),
        ("run_glue.py", [*SST2, "--dataset_name", "imdb"], "--dataset_name and --train_file (or another file) exclude"),
        ("run_glue.py", [*SST2, "--do_train", "--do_predict"], "there is no test set among ['train', 'validation']"),
        (
            "run_glue.py",
            [*SST2, "--load_in_4bit", "--load_in_8bit"],
            "load_in_4bit and load_in_8bit exclude each other",
        ),
        ("run_glue.py", [*SST2, "--init_lora_weights", "eva"], "init_lora_weights='eva' must be one of true, false"),
        ("run_glue.py", [*SST2, "--init_lora_weights", "pissa_niter_4"], "nobody could load the adapter exactly"),
        ("run_glue.py", [*SST2, "--lora_pro_mode", "fast"], "--lora_pro_mode"),
        ("run_glue.py", ["--train_file", f"{DATA}/sst2.jsonl"], "--model_name_or_path"),
        ("run_glue.py", ["no.yaml"], "cannot read the recipe"),
        ("run_glue.py", ["a.yaml", "--config", "b.yaml"], "a.yaml and b.yaml: one recipe at a time"),
        ("run_clm.py", [*CLM, "--do_predict"], "--do_predict: a language model on plain text has nothing to predict"),
        ("run_clm.py", [*CLM, "--do_train", "--text_column", "words"], "--text_column words: the columns are ['text']"),
        ("run_clm.py", [*CLM, "--do_train", "--block_size", "999"], "--block_size 999: the model takes at most 256"),
        ("run_clm.py", [*CLM, "--do_train", *PORJ], "LlamaForCausalLM has no q_porj (did you mean q_proj"),
        ("run_sft.py", [*SFT, *PORJ], "LlamaForCausalLM has no q_porj (did you mean q_proj"),
        ("run_sft.py", [*SFT, "--do_predict"], "use `lorapro evaluate`"),
        ("run_sft.py", [*SFT, "--prompt_column", "q"], "--prompt_column and --completion_column go together"),
        ("run_image_classification.py", [*IMAGES, "--dataset_name", "x"], "exclude --dataset_name and --train_file"),
        (
            "run_image_classification.py",
            ["--model_name_or_path", "x", "--train_dir", "no", "--do_train"],
            "--train_dir no: there is no such folder",
        ),
        ("run_speech_recognition.py", [*SPEECH, "--do_train", "--text_column_name", "t"], "there is no column t"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    program: str, words: list[str], message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal(program, *words)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("lora_rank: 8", "lora_rank is no option of run_glue.py; did you mean"),
        ("script: run_clm.py", "is a recipe for run_clm.py, not for run_glue.py"),
        ("extends: mine.yaml", "extends itself"),
        ("- a list", "must have lines of the form `flag: value`"),
        ("a: [", "is no YAML"),
        ("seed: 1\n  lora_r: 2", "mine.yaml is no YAML: mapping values are not allowed here in line 2, column 9"),
        ("lora_r: 2\nseed: 1\nlora_r: 4", "mine.yaml: the key 'lora_r' is there twice, in lines 1 and 3"),
    ],
)
def test_bad_recipe_is_refused(recipe: str, message: str, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "mine.yaml").write_text(recipe)
    assert message in refusal("run_glue.py", str(tmp_path / "mine.yaml"), *SST2)


def test_an_unknown_flag_is_answered_with_those_that_sound_like_it(refusal: Callable[..., str]) -> None:
    for mistaken, meant in (("--lora_rank", "--lora_r"), ("--lora_alfa=8", "--lora_alpha")):
        assert meant in refusal("run_glue.py", *SST2, mistaken).partition("did you mean")[2].replace("?", "").split()


def test_flags_override_a_recipe_and_a_recipe_what_it_extends(tmp_path: Path) -> None:
    base = {"model_name_or_path": LLAMA, "lora_r": 3, "lora_alpha": 5, "learning_rate": 1e-3, "weight_decay": 0.1}
    own = {"extends": "base.yaml", "script": "run_clm.py", "lora_alpha": 7, "weight_decay": None}
    own |= {"lora_target_modules": ["q_proj", "v_proj"], "do_train": True, "max_steps": 1, "block_size": 16}
    own |= {"train_file": f"{DATA}/text.txt", "use_cpu": True, "report_to": "none"}
    # YAML takes JSON
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    out = tmp_path / "out"
    script("run_clm.py").main([str(tmp_path / "own.yaml"), "--learning_rate", "2e-3", "--output_dir", str(out)])
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 7)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert (arguments.learning_rate, arguments.weight_decay) == (2e-3, 0.0)
    check_adapter(out, "run_clm.py")


def test_checkpoints_that_cannot_be_meant_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    words = [*CLM, *TINY, "--do_train"]
    missing = refusal("run_clm.py", *words, "--resume_from_checkpoint", "true")
    assert "has no checkpoint. Leave it out to start anew" in missing
    # nobody said whether to go on
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    assert "out holds checkpoints of an earlier training, the last checkpoint-7" in refusal("run_clm.py", *words)
    nowhere = refusal("run_clm.py", *words, "--resume_from_checkpoint", "no/checkpoint-1")
    assert "--resume_from_checkpoint no/checkpoint-1: there is no such folder" in nowhere


def test_a_saved_adapter_has_a_card_and_is_evaluated_and_trained_further(
    inputs: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    main, trained = script("run_glue.py").main, tmp_path / "trained"
    words = [*SST2, *TINY, "--model_name_or_path", str(inputs / LLAMA), "--task_name", "sst2", "--do_train"]
    main([*words, "--do_eval", "--output_dir", str(trained)])
    check_adapter(trained, "run_glue.py")
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "sst2" in card and "lora-pro" in card
    assert str(inputs) not in card and "base_model:" not in card and "a local Llama" in card
    assert f"{results(trained)['eval_accuracy']:.3g}"[:4] in card
    known = [*SST2, *TINY, "--adapter_name_or_path", str(trained)]
    other = [*known, "--lora_r", "4", "--do_eval"]
    assert "has r=2, which --lora_r 4 cannot change" in refusal("run_glue.py", *other)
    said = refusal("run_glue.py", *known, "--lora_modules_to_save", "norm", "--do_eval")
    assert "--lora_modules_to_save norm cannot change; leave lora_modules_to_save out" in said
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "adapter_config.json", bare)
    said = refusal("run_glue.py", *SST2, *TINY, "--adapter_name_or_path", str(bare), "--do_eval")
    assert f"the adapter {bare} has no weights, adapter_model.safetensors" in said
    main([*known, "--do_eval", "--output_dir", str(tmp_path / "judged")])
    # the head too is the trained one
    assert results(tmp_path / "judged")["eval_loss"] == pytest.approx(results(trained)["eval_loss"], rel=1e-6)
    main([*known, "--do_train", "--output_dir", str(tmp_path / "further")])
    first, second = factors(trained), factors(tmp_path / "further")
    assert first.keys() == second.keys()
    assert any(not torch.equal(values, second[name]) for name, values in first.items())


def rows_with_labels(tmp_path: Path, labels: list[Any]) -> str:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    rows = [json.dumps({"sentence": f"What is {n}?", "label": label}) for n, label in enumerate(labels)]
    path.write_text("\n".join(rows))
    return str(path)


def test_test_sets_may_hide_their_labels(tmp_path: Path) -> None:
    hidden = rows_with_labels(tmp_path, [-1] * 5)
    out = tmp_path / "out"
    script("run_glue.py").main(
        [*SST2, *TINY, "--task_name", "sst2", "--test_file", hidden, "--do_predict", "--output_dir", str(out)]
    )
    assert "predict_loss" not in results(out)
    lines = (out / "predictions.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 6
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


def test_labels_that_are_measures_make_a_regression(tmp_path: Path) -> None:
    train = rows_with_labels(tmp_path, [n / 3 for n in range(8)])
    out = tmp_path / "out"
    words = [*GLUE, *TINY, "--train_file", train, "--validation_file", train, "--task_name", "stsb"]
    words[words.index("--task_name") :] = ["--metric_for_labels", "pearson_and_spearman"]
    script("run_glue.py").main(
        [*words, "--do_train", "--do_eval", "--test_file", train, "--do_predict", "--output_dir", str(out)]
    )
    found = results(out)
    assert {"eval_pearson", "eval_spearmanr", "eval_combined_score"} <= found.keys()
    assert all(float(line.split("\t")[1]) < 100 for line in (out / "predictions.txt").read_text().splitlines()[1:])
    check_adapter(out, "run_glue.py")


def test_labels_may_be_words(tmp_path: Path, refusal: Callable[..., str]) -> None:
    train = rows_with_labels(tmp_path, ["good", "bad"] * 4)
    other = rows_with_labels(tmp_path, ["good", "ugly"])
    words = [*GLUE, *TINY, "--train_file", train]
    message = refusal("run_glue.py", *words, "--validation_file", other, "--do_train", "--do_eval")
    assert "the training set has no label 'ugly', only ['bad', 'good']" in message
    out = tmp_path / "words"
    script("run_glue.py").main([*words, "--test_file", train, "--do_predict", "--output_dir", str(out)])
    assert {line.split("\t")[1] for line in (out / "predictions.txt").read_text().splitlines()[1:]} <= {"good", "bad"}


def test_images_are_classified(tmp_path: Path) -> None:
    words = [*IMAGES, *TINY, "--random_crop", "--random_flip", "--gradient_checkpointing"]
    words += ["--validation_dir", f"{DATA}/images", "--do_train", "--do_eval", "--output_dir", str(tmp_path)]
    script("run_image_classification.py").main(words)
    assert 0 <= results(tmp_path)["eval_accuracy"] <= 1
    check_adapter(tmp_path, "run_image_classification.py")


def test_speech_is_written_down(tmp_path: Path, refusal: Callable[..., str]) -> None:
    out = tmp_path / "speech"
    words = [*SPEECH, *TINY, "--test_file", f"{DATA}/speech/train.jsonl", "--do_train", "--do_predict"]
    script("run_speech_recognition.py").main(
        [*words, "--output_dir", str(out), "--text_case", "upper", "--gradient_checkpointing"]
    )
    assert results(out)["predict_wer"] >= 0
    assert len((out / "predictions.txt").read_text().splitlines()) == 6
    assert {"H", "I", "G", "|"} <= json.loads((out / "vocab.json").read_text()).keys()
    check_adapter(out, "run_speech_recognition.py")
    other = refusal("run_speech_recognition.py", *words, "--tokenizer_name", str(out))
    assert "does not know most letters of the training set" in other and "--text_case" in other


def test_texts_are_translated(tmp_path: Path) -> None:
    pairs = [{"translation": {"en": f"What is {n}?", "la": f"Quid est {n}?"}} for n in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    words = ["--model_name_or_path", f"{INPUTS}/models/t5", *TINY, "--train_file", str(file), "--test_file", str(file)]
    words += ["--source_lang", "en", "--target_lang", "la", "--source_prefix", "translate: ", "--metric", "sacrebleu"]
    words += ["--max_target_length", "8", "--predict_with_generate", "--do_train", "--do_predict"]
    out = tmp_path / "out"
    script("run_seq2seq.py").main([*words, "--output_dir", str(out)])
    assert results(out)["predict_bleu"] >= 0
    assert len((out / "predictions.txt").read_text().splitlines()) == 6
    assert "pipeline_tag: translation" in (out / "README.md").read_text()
    check_adapter(out, "run_seq2seq.py")


def test_card_and_hub_flags_reach_the_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, Any]] = []

    def record(trainer: Any, **kwargs: Any) -> None:
        pushed.append(kwargs)

    # what talks to the Hub; the card is written on the way
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, *_, **__: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: None)
    monkeypatch.setattr(LoRAProTrainer, "push_to_hub", record)
    hub = ["--push_to_hub", "--hub_model_id", "me/mine", "--hub_strategy", "end", "--hub_private_repo", "true"]
    out = tmp_path / "mine"
    script("run_glue.py").main([*SST2, *TINY, *hub, "--task_name", "sst2", "--do_train", "--output_dir", str(out)])
    assert len(pushed) == 2  # `save_model` pushes too, as in `Trainer`
    assert pushed[-1] == {"tasks": "text-classification", "dataset": "sst2"}  # the model is a local folder's
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert (arguments.hub_model_id, arguments.hub_private_repo, arguments.hub_strategy) == ("me/mine", True, "end")


@pytest.mark.slow
def test_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    script("run_clm.py").main([*CLM, *TINY, "--load_in_4bit", "--do_train", "--output_dir", str(tmp_path / "out")])
    check_adapter(tmp_path / "out", "run_clm.py")


@pytest.mark.slow
def test_tensorboard_shows_the_metrics_of_lora_pro(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*CLM, *TINY, "--do_train", "--logging_steps", "1", "--output_dir", str(tmp_path / "out")]
    script("run_clm.py").main([*words, "--report_to", "tensorboard"])
    (events,) = tmp_path.rglob("events.out.tfevents*")
    seen = EventAccumulator(str(events.parent)).Reload()
    assert {"train/loss", "train/lora_pro_grad_norm"} <= set(seen.Tags()["scalars"])
    assert len(seen.Scalars("train/lora_pro_grad_norm")) == 2
