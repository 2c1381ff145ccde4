"""Rows with pictures: which run_sft.py takes, in which form they reach the model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, load_dataset
from PIL import Image

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.data import DataArguments
from lorapro_hf.recipes.instructions import CHAT, InstructionArguments, prepared
from lorapro_hf.recipes.pictures import with_pictures
from script_helpers import INPUTS, QUIET, TINY, results, script
from trl_helpers import tokenizer

LLAVA, TABLE = f"{INPUTS}/models/llava", f"{INPUTS}/data/pictures.jsonl"


def colored(folder: Path, *colors: str) -> DataArguments:
    for color in colors:
        Image.new("RGB", (8, 8), color).save(folder / f"{color}.png")
    return DataArguments(train_file=str(folder / "rows.jsonl"))


def test_paths_start_at_the_folder_of_the_data_file(tmp_path: Path) -> None:
    data = colored(tmp_path, "red", "blue")
    one = with_pictures(Dataset.from_dict({"image": ["red.png", None, "blue.png"]}), "train", data)
    assert [picture.getpixel((0, 0)) for picture in one["image"]] == [(255, 0, 0), (0, 0, 255)]
    lists = with_pictures(Dataset.from_dict({"images": [["red.png", "blue.png"], []]}), "train", data)
    assert [len(pictures) for pictures in lists["images"]] == [2, 0]
    assert lists[0]["images"][1].getpixel((0, 0)) == (0, 0, 255)
    assert with_pictures(lists, "train", data)[0]["images"][0].size == (8, 8), "pictures stay as they are"
    with pytest.raises(UsageError, match=r"the picture green\.png of the train set does not exist in the folder"):
        with_pictures(Dataset.from_dict({"image": ["green.png"]}), "train", data)


def test_pictures_stay_beside_prompts_from_other_columns() -> None:
    rows = Dataset.from_dict({"q": ["?"], "a": ["red"], "image": ["red.png"], "other": [1]})
    data = InstructionArguments(train_file="x.jsonl", prompt_column="q", completion_column="a", prompt_template=CHAT)
    assert set(prepared(rows, "train", data, tokenizer(), {}).column_names) == {"prompt", "completion", "image"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model_name_or_path", f"{INPUTS}/models/llama"],
            "llama reads no pictures, and the rows have",
        ),
        (["--packing"], "--packing: TRL packs texts alone, and the rows have pictures"),
        (
            ["--validation_file", f"{INPUTS}/data/messages.jsonl", "--do_eval"],
            "the validation set has no column image or images, only ['messages']",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    given = ["--model_name_or_path", LLAVA, "--train_file", TABLE, *words, *QUIET, "--bf16=false", "--do_train"]
    with pytest.raises(SystemExit) as caught:
        script("run_sft.py").main([*given, "--output_dir", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_model_sees_the_pictures(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows with other pictures have another loss."""
    monkeypatch.chdir(inputs)
    table: Any = load_dataset("json", data_files=TABLE, split="train", cache_dir=str(tmp_path / "cache"))
    colored(tmp_path, "black", "white")
    losses = []
    for color in ("black", "white", "white"):
        rows = [json.dumps({"image": f"{color}.png", "messages": row["messages"]}) for row in table.select(range(2))]
        file, out = tmp_path / f"{color}.jsonl", tmp_path / f"{len(losses)}"
        file.write_text("\n".join(rows))
        words = ["--model_name_or_path", LLAVA, "--validation_file", str(file), *TINY, "--bf16=false", "--do_eval"]
        script("run_sft.py").main([*words, "--output_dir", str(out)])
        losses.append(results(out)["eval_loss"])
    black, white, again = torch.tensor(losses)
    assert white == again != black
