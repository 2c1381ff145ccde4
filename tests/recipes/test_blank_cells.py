"""Cells that are blank or hold no text: rows that are left out and counted, and columns that are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Image
from transformers import TrainingArguments

from lorapro_hf.commands.common.problems import load_problems
from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.sources import table
from lorapro_hf.commands.evaluate.data import load_rows
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, with_texts
from lorapro_hf.recipes.data import load_splits
from lorapro_hf.recipes.files import read_file
from lorapro_hf.recipes.instructions import InstructionArguments, prepared
from script_helpers import script

WHERE = "the train set"


@pytest.fixture(autouse=True)
def _with_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def rows_of(lines: str, suffix: str = ".jsonl") -> Dataset:
    path = Path(f"rows{suffix}")
    path.write_text(lines)
    return read_file(str(path), "--train_file")


BLANK = {
    ".jsonl": '{"a": "x", "b": "y"}\n{"a": null, "b": "y"}\n{"a": "x"}\n{"a": "u", "b": "v"}\n{"a": "x", "b": " "}\n',
    ".csv": 'a,b\nx,y\n,y\nx,\nu,v\nx," "\n',
}


@pytest.mark.parametrize("suffix", BLANK)
def test_blank_rows_are_left_out_and_counted_in_one_line(suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(BLANK[suffix], suffix)
    found = with_texts(rows, ("a", "b"), WHERE, need_text=("b",))
    assert list(found) == [{"a": "x", "b": "y"}, {"a": "u", "b": "v"}]
    assert [record.getMessage() for record in caplog.records] == [
        "the train set: 3 of 5 rows are blank in a or b and are left out."
    ]
    assert len(with_texts(rows, ("a", "b"), WHERE)) == 3  # spaces are a text where none is needed


def test_one_process_of_several_counts_them(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert len(with_texts(rows_of(BLANK[".csv"], ".csv"), ("a", "b"), WHERE)) == 3
    assert not caplog.records


def test_rows_without_blank_cells_are_what_they_were() -> None:
    rows = Dataset.from_list([{"a": "x"}, {"a": ""}])
    assert with_texts(rows, ("a",), WHERE) is rows
    assert len(complete_rows(rows.select([]), ("a",), WHERE)) == 0


@pytest.mark.parametrize("cells", [[None, None], ["", " \n"]])
def test_a_column_that_is_blank_throughout_is_refused(cells: list[Any]) -> None:
    rows = Dataset.from_list([{"a": cell, "b": "y"} for cell in cells])
    with pytest.raises(UsageError, match="the column a of the train set is blank in every row"):
        with_texts(rows, ("a", "b"), WHERE, need_text=("a",))


@pytest.mark.parametrize(
    ("cells", "written"), [([42, None, 7], ["42", "7"]), ([1.5, 2.0], ["1.5", "2.0"]), ([float("nan"), 3.0], ["3.0"])]
)
def test_numbers_are_texts(cells: list[Any], written: list[str]) -> None:
    rows = Dataset.from_list([{"a": cell} for cell in cells])
    assert with_texts(rows, ("a",), WHERE)["a"][:] == written


def test_whole_numbers_of_a_table_are_written_whole() -> None:
    assert with_texts(rows_of("a,b\n42,x\n,y\n7,z\n", ".csv"), ("a",), WHERE)["a"][:] == ["42", "7"]


@pytest.mark.parametrize(
    ("cell", "kind"), [(["x"], "list"), ({"x": 1}, "dict"), (True, "bool")], ids=["list", "mapping", "bool"]
)
def test_other_cells_are_refused_with_their_row(cell: Any, kind: str) -> None:
    rows = Dataset.from_list([{"a": None}, {"a": cell}])
    with pytest.raises(UsageError, match=f"the column a of the train set has no text in row 2 but a {kind}: "):
        with_texts(rows, ("a",), WHERE)


def test_a_list_among_texts_is_refused_with_its_row() -> None:
    # datasets 3 refuses such a file itself
    with pytest.raises(UsageError, match=r"no text in row 2 but a list|changed from string to array in row 1"):
        with_texts(rows_of('{"a": "x"}\n{"a": ["y"]}\n'), ("a",), WHERE)


def instructions(rows: list[dict[str, Any]], **how: Any) -> list[Any]:
    data = InstructionArguments(train_file="x.json", prompt_column="q", completion_column="a", **how)
    return list(prepared(Dataset.from_list(rows), "train", data, None, {}))  # type: ignore[arg-type]


def test_no_word_none_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "What?", "a": 42}, {"q": None, "a": 1}, {"q": "Why?", "a": None}, {"q": "Who?", "a": 7}]
    assert instructions(rows) == [{"prompt": "What?", "completion": "42"}, {"prompt": "Who?", "completion": "7"}]
    assert "2 of 4 rows are blank in q or a" in caplog.text
    assert [row["completion"] for row in instructions(rows, completion_pattern=r"\d|None")] == ["4", "7"]
    with pytest.raises(UsageError, match="the column a of the train set has no text in row 1 but a list"):
        instructions([{"q": "What?", "a": ["x"]}])


def test_conditions_never_hold_in_blank_cells() -> None:
    rows = [{"q": str(n), "a": "x", "kind": kind} for n, kind in enumerate([None, "None", "good", None])]
    assert [row["prompt"] for row in instructions(rows, keep_where=["kind=None|good"])] == ["1", "2"]
    assert [row["prompt"] for row in instructions(rows, drop_where=["kind=None"])] == ["0", "2", "3"]
    flags = [{"q": str(n), "a": "x", "ok": ok} for n, ok in enumerate([True, False])]
    assert [row["prompt"] for row in instructions(flags, keep_where=["ok=True"])] == ["0"]
    lists = [{"q": "0", "a": "x", "tags": ["good"]}]
    with pytest.raises(UsageError, match="the column tags of the train set has no text in row 1 but a list"):
        instructions(lists, keep_where=["tags=good"])


def test_blank_inputs_add_nothing_to_an_instruction() -> None:
    rows = [{"q": "Add.", "a": "x", "i": cell} for cell in (None, " ", "0")]
    assert [row["prompt"] for row in instructions(rows, input_column="i")] == ["Add.", "Add.", "Add.\n\n0"]


def prepare(program: str, function: str, arguments: str, rows: list[dict[str, Any]], split: str = "train", **how: Any):
    module = script(program)
    data = getattr(module, arguments)(train_file="x.json", **how)
    return list(getattr(module, function)(Dataset.from_list(rows), split, data))


@pytest.mark.parametrize("blank", ["source", "target"])
def test_texts_to_read_and_to_write_are_no_word_none(blank: str) -> None:
    rows = [{"source": "a", "target": 1}, {"source": "b", "target": 2}]
    rows[0][blank] = None
    words = ("run_seq2seq.py", "complete", "TextPairArguments")
    assert prepare(*words, rows) == [{"source": "b", "target": "2"}]
    pairs = [{"translation": {"en": row["source"], "la": str(row["target"] or "") or None}} for row in rows]
    found = prepare(*words, pairs, source_lang="en", target_lang="la")
    assert found == [{"translation.en": "b", "translation.la": "2"}]


def test_what_is_to_be_written_may_be_hidden_in_a_test_set() -> None:
    words = ("run_seq2seq.py", "complete", "TextPairArguments")
    rows = [{"source": "a", "target": None}, {"source": "b", "target": None}]
    assert prepare(*words, rows, "test") == rows
    rows[1]["target"] = "x"
    with pytest.raises(UsageError, match=r"the column target of the test set is blank in row 1.*order of the rows"):
        prepare(*words, rows, "test")


def test_plain_texts_leave_out_blank_cells_but_not_empty_lines() -> None:
    rows = [{"body": "x"}, {"body": None}, {"body": ""}]
    assert prepare("run_clm.py", "texts", "TextArguments", rows) == [{"text": "x"}, {"text": ""}]
    with pytest.raises(UsageError, match="the column body of the train set has no text in row 1 but a list"):
        prepare("run_clm.py", "texts", "TextArguments", [{"body": ["x"]}])
    with pytest.raises(UsageError, match=r"the column messages of the train set holds messages: .* by run_sft.py"):
        prepare("run_clm.py", "texts", "TextArguments", [{"id": "x", "messages": [{"role": "user", "content": "q"}]}])


def test_labels_and_their_texts_are_no_word_none() -> None:
    words = ("run_glue.py", "complete", "GlueArguments")
    rows = [{"sentence": "x", "label": 1}, {"sentence": None, "label": 1}, {"sentence": "y", "label": None}]
    assert prepare(*words, rows) == [{"sentence": "x", "label": 1}]
    hidden = [{"sentence": "x", "label": None}]
    assert prepare(*words, hidden, "test") == hidden
    with pytest.raises(UsageError, match="the column label of the train set is blank in every row"):
        prepare(*words, hidden)
    with pytest.raises(UsageError, match="the column number holds numbers"):
        prepare(*words, [{"number": 1, "sentence": "x", "label": 1}])


def test_whole_labels_beside_blank_ones_stay_classes() -> None:
    rows = rows_of("sentence,label\nx,1\ny,\nz,0\n", ".csv")
    module = script("run_glue.py")
    found = module.complete(rows, "train", module.GlueArguments(train_file="x.csv"))
    assert module.labels_of({"train": found}) == ["0", "1"]


def test_preferences_are_no_word_none() -> None:
    pytest.importorskip("trl")
    words = ("run_dpo.py", "preferences", "PreferenceArguments")
    whole = {"prompt": "q", "chosen": "a", "rejected": ""}
    for column in whole:
        assert prepare(*words, [whole, {**whole, column: None}]) == [whole]
    turns = {"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user", "content": "r"}]}
    assert prepare(*words, [turns, {**turns, "chosen": None}]) == [turns]


@pytest.mark.parametrize(
    "row",
    [{"text": "x"}, {"prompt": "q", "completion": "a"}, {"messages": [{"role": "user", "content": "q"}]}],
    ids=lambda row: "-".join(row),
)
def test_columns_of_trl_are_no_word_none(row: dict[str, Any]) -> None:
    pytest.importorskip("trl")
    for column in row:
        rows = Dataset.from_list([row, {**row, column: None}])
        assert list(script("run_sft.py").trainable(rows, "train", "text", {})) == [row]


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALLED = [SAID[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]


@pytest.mark.parametrize(
    "blank",
    [
        [],
        [SAID[0], None],
        [SAID[0], {"role": "assistant", "content": None}],
        [SAID[0], {"role": "assistant"}],
        [{"role": None, "content": "q"}, SAID[1]],
        pytest.param(
            [SAID[0], {"role": "assistant", "content": [{"type": "text", "text": None}]}],
            marks=pytest.mark.skipif(
                int(datasets.__version__.split(".")[0]) < 4, reason="this datasets reads no column of texts and lists"
            ),
        ),
    ],
    ids=["no-message", "null", "null-content", "no-content", "null-role", "null-part"],
)
@pytest.mark.parametrize(
    "columns",
    [
        ["messages"],
        *(pytest.param(c, marks=pytest.mark.slow) for c in (["prompt", "completion"], ["chosen", "rejected"])),
    ],
    ids=" ".join,
)
def test_messages_are_no_word_none(columns: list[str], blank: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("trl")
    whole = dict.fromkeys(columns, SAID)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (whole, {**whole, columns[-1]: blank})))
    rows = read_file("rows.jsonl", "--train_file")
    if columns == ["chosen", "rejected"]:
        module = script("run_dpo.py")
        found = module.preferences(rows, "train", module.PreferenceArguments(train_file="x.json"))
    else:
        found = script("run_sft.py").trainable(rows, "train", "text", {})
    assert [row[columns[-1]][1]["content"] for row in found] == ["a"]
    assert f"1 of 2 rows are blank in {columns[-1]}" in caplog.text


def test_turns_of_sharegpt_and_calls_of_tools() -> None:
    pytest.importorskip("trl")
    known = script("run_sft.py").trainable
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = Dataset.from_list([{"conversations": turns}, {"conversations": [turns[0], {"from": "gpt", "value": None}]}])
    assert list(known(rows, "train", "text", {})) == [{"conversations": turns}]
    assert len(known(Dataset.from_list([{"messages": CALLED}, {"messages": SAID}]), "train", "text", {})) == 2


@pytest.mark.parametrize(("content", "kind"), [({"x": 1}, "dict"), (True, "bool")])
def test_messages_of_other_kinds_are_refused_with_their_row(content: Any, kind: str) -> None:
    pytest.importorskip("trl")
    rows = Dataset.from_list([{"messages": None}, {"messages": [{"role": "user", "content": content}]}])
    with pytest.raises(UsageError, match=f"the column messages of the train set has .* in row 2 but a {kind}: "):
        script("run_sft.py").trainable(rows, "train", "text", {})


def test_messages_without_a_role_are_refused() -> None:
    pytest.importorskip("trl")
    known = script("run_sft.py").trainable
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': SAID})}\n" + '{"messages": ["hi"]}\n')
    # older versions of datasets refuse such a file themselves
    with pytest.raises(UsageError, match=r"messages of the train set has .* in row 2 but a str: 'hi'|rows.jsonl"):
        known(read_file("rows.jsonl", "--train_file"), "train", "text", {})
    for cell in ("[]", ["hi"], [1, 2]):
        with pytest.raises(UsageError, match="the column messages of the train set must hold lists of messages"):
            known(Dataset.from_list([{"messages": cell}]), "train", "text", {})


def test_recordings_and_images_without_labels_are_left_out() -> None:
    pytest.importorskip("soundfile")
    rows = [{"audio": "a.wav", "text": "x"}, {"audio": None, "text": "y"}, {"audio": "b.wav", "text": None}]
    assert prepare("run_speech_recognition.py", "recordings", "SpeechArguments", rows) == rows[:1]
    pictures = [{"image": "a.png", "label": "x"}, {"image": "b.png", "label": None}]
    assert prepare("run_image_classification.py", "labelled", "ImageArguments", pictures) == [
        {"image": "a.png", "label": 0}
    ]


def test_no_picture_is_read_to_see_whether_it_is_there() -> None:
    rows = Dataset.from_list([{"image": "nowhere.png"}, {"image": None}]).cast_column("image", Image())
    assert len(complete_rows(rows, ("image",), WHERE)) == 1


def test_a_score_leaves_no_problem_out() -> None:
    Path("problems.jsonl").write_text('{"question": "1?", "answer": 1}\n{"question": "2?", "answer": null}\n')
    with pytest.raises(UsageError, match=r"the column answer of problems.jsonl is blank in row 2.*every problem"):
        load_rows("problems.jsonl", ("question", "answer"))
    Path("problems.jsonl").write_text('{"question": "1?", "answer": 1}\n')
    assert list(load_rows("problems.jsonl", ("question", "answer"))) == [{"question": "1?", "answer": "1"}]


def test_demo_and_comparison_leave_blank_rows_out() -> None:
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(9)] + [{"question": "9?"}]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train, held_out = load_problems(100, 3, dataset="rows.jsonl")
    assert len(train) + len(held_out) == 9
    task = TaskSettings(name="t", kind="classification", dataset="rows.jsonl", validation_size=2, test_size=2)
    assert sum(map(len, table(task, ("question", "answer")).values())) == 9


def test_what_is_not_used_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    Path("train.jsonl").write_text('{"q": "x", "a": "y"}\n')
    Path("test.jsonl").write_text('{"q": "x", "a": null}\n')
    data = InstructionArguments(
        train_file="train.jsonl", test_file="test.jsonl", prompt_column="q", completion_column="a"
    )
    with caplog.at_level(logging.WARNING):
        splits = load_splits(
            data,
            TrainingArguments("out", do_train=True, use_cpu=True),
            prepare=lambda rows, split: prepared(rows, split, data, None, {}),  # type: ignore[arg-type]
        )
    assert list(splits) == ["train"] and not caplog.records
