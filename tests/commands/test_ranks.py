"""`lorapro ranks` on texts and images, the file that it writes in a training, and bad input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapro_hf import cli, gelora_ranks
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import AdapterArguments, add_adapter
from script_helpers import QUIET, factors, make_inputs, script
from trainer_helpers import tiny_base

WORDS = ("red", "green", "blue", "one", "two", "three", "sun", "moon", "tree", "cat", "dog", "runs", "sees", "finds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in `build/smoke/models` and 60 texts in text.jsonl, of which one stands there twice."""
    root = make_inputs(tmp_path_factory.mktemp("ranks"))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(60)]
    (root / "text.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in [*texts, texts[0]]))
    return root


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def ranks(capsys: pytest.CaptureFixture[str], model: str, *words: str) -> tuple[int, Any]:
    """The exit code of the command, and its JSON or its last line on stderr."""
    code = cli.main(["ranks", f"build/smoke/models/{model}", *words, "--device", "cpu"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 and "--json" in words else printed.err.splitlines()[-1:]


def test_the_ranks_of_texts_go_into_a_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "lora_config.json"
    words = ["--data", "text.jsonl", "--rank_floor", "2", "--alpha_over_r", "1.5", "--output", str(file), "--json"]
    code, report = ranks(capsys, "llama", *words)
    assert code == 0 and report["lora_config"] == json.loads(file.read_text())
    assert {block["points"] for block in report["blocks"]} == {60}

    name = "build/smoke/models/llama"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()[:-1]]
    batches = [{"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in texts]
    expected = gelora_ranks(model, batches, rank_floor=2, alpha_over_r=1.5)
    pattern = {name.removeprefix(r"model\."): rank for name, rank in expected["rank_pattern"].items()}
    assert report["lora_config"]["rank_pattern"] == pattern and max(pattern.values()) > 2

    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    lines = ["script: run_clm.py", f"model_name_or_path: {name}", "train_file: text.jsonl", "do_train: true"]
    lines += ["block_size: 32", "max_steps: 1", "learning_rate: 1.0e-3", f"lora_config: {file}", f"output_dir: {out}"]
    recipe.write_text("\n".join(lines))
    script("run_clm.py").main([str(recipe), *QUIET])
    saved = {name: values.shape[0] for name, values in factors(out).items() if "lora_A" in name}
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    plain = {name.replace("\\", ""): rank for name, rank in expected["rank_pattern"].items()}
    assert saved == {f"{prefix}{name}{suffix}": rank for name, rank in plain.items()}
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 3


def test_a_table_and_a_file_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "build/smoke/data/mnli.jsonl", "--text_columns", "premise", "hypothesis", "--max_points", "20"]
    words += ["--rank_floor", "30", "--output", str(tmp_path / "a.json")]
    assert cli.main(["ranks", "build/smoke/models/llama", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["block", "dimension", "in", "out", "rank", "layers"]
    assert [line.split()[0] for line in lines[1:3]] == ["layers.0", "layers.1"]
    assert lines[1].split()[-2:] == ["16–30", "7"]  # k_proj and v_proj have 16 rows
    assert lines[4].startswith("14 layers, mean rank 26.00, from 20 points")
    assert lines[5] == "No block needs more than the least rank, 30; --rank_floor raises it."
    assert lines[-1].endswith(f"--lora_config {tmp_path / 'a.json'} --lora_r 30 --lora_alpha 60")


@pytest.mark.parametrize(
    ("model", "words", "blocks"),
    [
        ("llama", ["--data", "build/smoke/data/messages.jsonl"], ["layers.0", "layers.1"]),
        (
            "t5",
            ["--data", "build/smoke/data/summaries.jsonl", "--text_columns", "document", "summary"],
            ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
        ),
        ("vit", ["--data", "build/smoke/data/images", "--pooling", "tokens"], ["vit.layers.0", "vit.layers.1"]),
    ],
)
def test_conversations_pairs_and_images(
    model: str, words: list[str], blocks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = ranks(capsys, model, *words, "--json", "--output", str(tmp_path / "a.json"))
    assert code == 0
    names = [block["block"] for block in report["blocks"]]
    assert names == blocks or names == [
        name.replace("vit.", "vit.encoder.").replace("layers", "layer") for name in blocks
    ]


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("llama", ["--data", "no.jsonl"], "--data no.jsonl: there is no such file or folder"),
        ("llama", ["--data", "build/smoke/data/mnli.jsonl"], "name those to read by --text_columns"),
        ("llama", ["--data", "text.jsonl", "--text_columns", "txt"], "there is no column txt"),
        ("t5", ["--data", "text.jsonl"], "name both columns by --text_columns"),
        ("vit", ["--data", "build/smoke/data/images"], "on --data build/smoke/data/images: vit."),
        ("vit", ["--data", "build/smoke/data/images"], "sequences, or --pooling tokens."),
        ("llama", ["--data", "text.jsonl", "--max_points", "5"], "--max_points 5 must be a whole number of at least"),
        ("llama", ["--data", "build/smoke/data/images"], "cannot load the model build/smoke/models/llama"),
    ],
)
def test_bad_input_is_one_line(
    model: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = ranks(capsys, model, *words, "--output", str(tmp_path / "a.json"))
    assert code == 2 and said in lines[0] and not (tmp_path / "a.json").exists()


def test_options_without_a_meaning_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config_file(tmp_path / "data.jsonl", text="a")
    code, lines = ranks(capsys, "llama", "--data", data, "--load_in_4bit", "--device", "cpu")
    assert code == 2 and "--device would be ignored with --load_in_4bit" in lines[0]
    code, lines = ranks(capsys, "llama", "--data", data, "--output", str(tmp_path))
    assert code == 2 and "is a folder: name a file in it" in lines[0]


def config_file(path: Path, **content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_file_and_flags_that_agree_make_one_adapter(tmp_path: Path) -> None:
    pattern = {r"model\.layers\.0\.self_attn\.q_proj": 3}
    file = config_file(tmp_path / "a.json", r=2, rank_pattern=pattern, target_modules=["q_proj"], use_rslora=True)
    arguments = AdapterArguments(lora_config=file, lora_r=2, lora_dropout=0.1)  # the file has no dropout
    config = add_adapter(tiny_base(), arguments, "CAUSAL_LM").active_peft_config
    assert (config.r, config.rank_pattern, config.lora_dropout) == (2, pattern, 0.1)
    assert config.use_rslora and config.target_modules == {"q_proj"} and config.lora_alpha == 16


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ({"r": 2}, {"lora_r": 4}, r"has r=2, which --lora_r 4 contradicts: give --lora_r that value .*`lora_r: null`"),
        ({"target_modules": "all-linear"}, {"lora_target_modules": ["q_proj"]}, "which --lora_target_modules"),
        ({"init_lora_weights": True}, {"init_lora_weights": "pissa"}, "has init_lora_weights='true'"),
        ({"r": 2}, {"adapter_name_or_path": "runs/a"}, "leave out --lora_config or --adapter_name_or_path"),
        ({"inference_mode": True}, {}, "leave out 'inference_mode'; the file may hold r, lora_alpha"),
        ({"r": 1.5}, {}, "r is 1.5, not a whole number from 1 on"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "rank_pattern of 'q_proj' is 0, not a whole number"),
        ({"rank_pattern": {"q_proj(": 1}}, {}, r"'q_proj\(' in rank_pattern is no pattern"),
        ({"alpha_pattern": [1]}, {}, "alpha_pattern is \\[1\\], not an object of names"),
    ],
)
def test_a_file_that_cannot_be_taken(content: dict[str, Any], flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        AdapterArguments(lora_config=config_file(tmp_path / "a.json", **content), **flags)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--lora_config .*a\.json: No such file"):
        AdapterArguments(lora_config=str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("{\n r: 1}")
    with pytest.raises(UsageError, match=r"is no JSON: .* in line 2"):
        AdapterArguments(lora_config=str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UsageError, match="must hold a JSON object"):
        AdapterArguments(lora_config=str(tmp_path / "a.json"))


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    file = config_file(tmp_path / "a.json", rank_pattern={r"encoder\.layer\.0\.query": 3})
    with pytest.raises(UsageError, match=r"rank_pattern: \w+ has no layer that .* matches.*lorapro ranks"):
        add_adapter(tiny_base(), AdapterArguments(lora_config=file), "CAUSAL_LM")
