"""Data files and folders: exactly the one that is named is read, and what is broken in it is said in one line."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import TrainingArguments

from lorapro_hf.commands.common.problems import load_problems
from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.sources import table
from lorapro_hf.commands.evaluate.data import load_rows
from lorapro_hf.options import UsageError
from lorapro_hf.recipes import files, quiet
from lorapro_hf.recipes.data import DataArguments, load_splits
from lorapro_hf.recipes.files import read_file, read_images, reason

NAMES = ["part?", "data [v2]", "x*", "[!a]", "50% of #1", "~b", "http:d", ".hidden", "a\\b"]
WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    ".jsonl": lambda path, rows: path.write_text("".join(f"{json.dumps(row)}\n" for row in rows)),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".csv": lambda path, rows: path.write_text(pandas.DataFrame(rows).to_csv(index=False)),
    ".parquet": lambda path, rows: path.write_bytes(pandas.DataFrame(rows).to_parquet()),
}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def write(name: str, rows: list[dict[str, Any]]) -> str:
    WRITERS[Path(name).suffix](Path(name), rows)
    return name


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_files_of_every_kind_are_read_by_any_name(name: str, suffix: str) -> None:
    for other in ("part1", "data v", "a", "b", "xyz"):  # what the names would match
        write(f"{other}{suffix}", [{"text": other}] * 3)
    rows = [{"text": "one", "number": 1}, {"text": "two", "number": 2}]
    assert list(read_file(write(f"{name}{suffix}", rows), "--train_file")) == rows


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_read_by_any_name(name: str) -> None:
    Path(f"{name}.txt").write_text("one\n\ntwo\n")
    assert read_file(f"{name}.txt", "--train_file")["text"][:] == ["one", "", "two"]


def test_a_file_that_has_changed_is_read_again() -> None:
    for text in ("old", "new"):
        assert read_file(write("a?.jsonl", [{"text": text}]), "--train_file")["text"][:] == [text]
        with gzip.open("b.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": text}))
        assert read_file("b.jsonl.gz", "--train_file")["text"][:] == [text]


def test_all_programs_read_exactly_the_named_file() -> None:
    name = "part?.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(9)]
    write("part1.jsonl", [{"question": "another", "answer": "#### 0"}] * 9)
    write(name, rows)
    splits = load_splits(DataArguments(train_file=name), TrainingArguments("out", do_train=True, use_cpu=True))
    assert list(splits["train"]) == rows
    assert list(load_rows(name, ("question", "answer"))) == rows
    train, held_out = load_problems(100, 3, dataset=name)
    assert sorted([*train["question"], *held_out["question"]]) == [row["question"] for row in rows]
    task = TaskSettings(name="t", kind="text", dataset=name, text_column="question", validation_size=2, test_size=2)
    found = [question for part in table(task, ("question",)).values() for question in part["question"]]
    assert sorted(found) == [row["question"] for row in rows]


TRAINING = {"do_train": True, "use_cpu": True}


def test_folders_are_read_unless_datasets_takes_them_for_patterns() -> None:
    rows = [{"question": "one", "answer": "#### 1"}]
    for name in ("plain", "my [folder]", "folder?", "a::b"):
        Path(name).mkdir()
        write(f"{name}/train.jsonl", rows)
        data = DataArguments(dataset_name=name)
        if name == "plain":
            assert list(load_splits(data, TrainingArguments("out", **TRAINING))["train"]) == rows
            continue
        with pytest.raises(UsageError, match="rename it without"):
            load_splits(data, TrainingArguments("out", **TRAINING))
    Dataset.from_list(rows * 2).save_to_disk("saved [1]")
    splits = load_splits(DataArguments(dataset_name="saved [1]"), TrainingArguments("out", **TRAINING))
    assert len(splits["train"]) == 2
    with pytest.raises(UsageError, match="datasets splits paths at ::; rename"):
        read_file(write("a::b.jsonl", [{"text": "one"}]), "--train_file")


def test_images_are_found_in_the_folders_of_their_classes() -> None:
    for color in ("red", "blue"):
        Path("pictures", color).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(Path("pictures", color, "0.png"))
    images = read_images("pictures", "--train_dir")
    assert len(images) == 2 and images.features["label"].names == ["blue", "red"]
    Path("empty").mkdir()
    with pytest.raises(UsageError, match="--train_dir empty: "):
        read_images("empty", "--train_dir")
    Path("pictures").rename("pictures?")
    with pytest.raises(UsageError, match="rename it without"):
        read_images("pictures?", "--train_dir")


BROKEN = {
    "cut.jsonl": (b'{"a":"x"}\n{"a":"y', "line 2 is no JSON: Unterminated string"),
    "middle.jsonl": (b'{"a":"x"}\n\n{"a":y}\n{"a":"z"}\n', "line 3 is no JSON: Expecting value at column 6"),
    "number.jsonl": (b'{"a":1}\n5\n', "line 2 is no JSON object"),
    "array.json": (b'[{"a":"x"},\n{"a":y}]', "line 2 is no JSON: Expecting value at column 6"),
    "latin.jsonl": ('{"a":"b"}\n{"a":"é"}\n'.encode("latin-1"), "line 2 is no UTF-8"),
    "latin.csv": ("a,b\nc,4\né,5\n".encode("latin-1"), "line 3 is no UTF-8"),
    "latin.txt": ("b\né\n".encode("latin-1"), "line 2 is no UTF-8"),
    "wide.jsonl": ('{"a":"x"}\n'.encode("utf-16"), "is no UTF-8 text but UTF-16"),
    "wide.csv": ("a,b\nx,5\n".encode("utf-16"), "is no UTF-8 text but UTF-16"),
    "wide.txt": ("abc\n".encode("utf-16-le"), "is no UTF-8 text but UTF-16"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "lines.jsonl": (b"\n\n", "there are no rows in it"),
    "header.csv": (b"a,b\n", "there are no rows in it"),
    "longer.csv": (b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
    "all_longer.csv": (b"a,b\n1,2,3\n4,5,6\n", "its rows have more cells than its header"),
    "quote.csv": (b'a,b\n"1,2\n', "EOF inside string"),
    "cut.parquet": (b"PAR1abc", "smaller than the minimum file footer"),
    "other.parquet": (b"PAR1" + bytes(20), "Parquet magic bytes not found"),
    "plain.jsonl.gz": (b'{"a": 1}', "cannot be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 99)[:-12], "cannot be read: Compressed file ended"),
    "table.xls": (b"x", "must end with one of .csv, .json, .jsonl, .parquet, .txt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_the_place(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert quiet  # programs import it
    content, message = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_file(name, "--train_file")
    said = str(caught.value)
    assert said.startswith(f"--train_file {name}: ") and message in said and "\n" not in said
    told = capfd.readouterr().err
    assert "ERROR" not in told and "Failed" not in told


def test_a_broken_file_of_a_folder_is_named() -> None:
    Path("data").mkdir()
    write("data/a.jsonl", [{"a": 1}])
    Path("data/b.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(UsageError, match=r"--dataset_name data: data/b.jsonl: line 2 is no JSON"):
        load_splits(DataArguments(dataset_name="data"), TrainingArguments("out", do_train=True, use_cpu=True))


def test_the_search_for_a_broken_file_passes_over_empty_texts_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data").mkdir()
    Path("data/a.txt").touch()
    write("data/b.jsonl", [{"a": 1}])
    Path("data/c.jsonl").write_text("{")
    assert "data/c.jsonl: line 1 is no JSON" in files.fault_in("data", ValueError("said"))
    monkeypatch.setattr(files, "_SEARCHED", 5)
    assert files.fault_in("data", ValueError("said")) == "said."


def test_a_full_disk_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("while reading") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "load_dataset", full)
    with pytest.raises(OSError, match="No space left on device"):
        read_file(write("a.jsonl", [{"a": 1}]), "--train_file")
    assert reason(ValueError("a\nb")) == "a b."


def test_marks_of_the_encoding_are_no_part_of_a_file() -> None:
    Path("a.jsonl").write_bytes('{"a": "é"}\n'.encode("utf-8-sig"))
    Path("a.csv").write_bytes("a\né\n".encode("utf-8-sig"))
    for name in ("a.jsonl", "a.csv"):
        assert list(read_file(name, "--train_file")) == [{"a": "é"}]


def test_whole_numbers_beside_blank_cells_stay_whole() -> None:
    Path("a.csv").write_text("whole,measured,text\n1,1.0,x\n,,\n3,3.0,y\n")
    rows = read_file("a.csv", "--train_file")
    assert rows["whole"][:] == [1, None, 3] and rows.features["whole"].dtype == "int64"
    assert rows["measured"][:] == [1.0, None, 3.0] and rows.features["measured"].dtype == "float64"


def test_splits_of_a_saved_data_set_are_chosen_by_name() -> None:
    parts = {name: Dataset.from_list([{"text": name}]) for name in ("train", "extra")}
    DatasetDict(parts).save_to_disk("saved")
    training = TrainingArguments("out", do_train=True, use_cpu=True)
    assert load_splits(DataArguments(dataset_name="saved", train_split="extra"), training)["train"]["text"][:] == [
        "extra"
    ]
    with pytest.raises(
        UsageError, match=r"--train_split train\[:1\]: Unknown split: saved has the splits \['extra', 'train'\]"
    ):
        load_splits(DataArguments(dataset_name="saved", train_split="train[:1]"), training)


def test_a_saved_data_set_that_was_cut_off_is_named() -> None:
    Dataset.from_list([{"text": "one" * 100}] * 500).save_to_disk("saved")
    (file,) = Path("saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UsageError, match="--dataset_name saved: "):
        load_splits(DataArguments(dataset_name="saved"), TrainingArguments("out", do_train=True, use_cpu=True))


@pytest.mark.parametrize(("name", "value"), [("max_train_samples", 0), ("preprocessing_num_workers", -3)])
def test_counts_that_are_not_positive_are_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{name} {value} must be positive"):
        DataArguments(**{name: value})


def test_a_single_row_cannot_be_shared_with_the_evaluation() -> None:
    data = DataArguments(train_file=write("a.jsonl", [{"text": "one"}]))
    with pytest.raises(UsageError, match="5 % of the 1 rows of the train set cannot be held out"):
        load_splits(data, TrainingArguments("out", do_train=True, do_eval=True, use_cpu=True))


def test_an_empty_slice_is_refused() -> None:
    Path("data").mkdir()
    write("data/train.jsonl", [{"text": "one"}])
    with pytest.raises(UsageError):
        load_splits(
            DataArguments(dataset_name="data", train_split="train[:0]"),
            TrainingArguments("out", do_train=True, use_cpu=True),
        )
