"""What a program says of a model, a data set or an adapter that is neither here nor to be fetched."""

from __future__ import annotations

from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from script_helpers import INPUTS, QUIET, script

LLAMA, DATA = ["--model_name_or_path", f"{INPUTS}/models/llama"], ["--train_file", f"{INPUTS}/data/sst2.jsonl"]


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("run_glue.py", [*LLAMA, "--dataset_name", "no/data"], "cannot load the data set no/data: "),
        ("run_glue.py", ["--model_name_or_path", "no/model", *DATA], "cannot load the configuration of the model no/"),
        (
            "run_clm.py",
            ["--model_name_or_path", "no/model", *DATA],
            "cannot load the tokenizer of the model no/model: ",
        ),
        (
            "run_clm.py",
            [*LLAMA, *DATA, "--tokenizer_name", "no/words"],
            "cannot load the tokenizer of the model no/wor",
        ),
        ("run_clm.py", [*LLAMA, *DATA, "--adapter_name_or_path", "no/adapter"], "cannot load the adapter no/adapter: "),
        (
            "run_image_classification.py",
            ["--model_name_or_path", f"{INPUTS}/models/llama", "--train_dir", f"{INPUTS}/data/images"],
            "cannot load the processor of the model build/smoke/models/llama: ",
        ),
    ],
)
def test_what_was_looked_for_and_its_name_are_said(
    program: str,
    words: list[str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    for library in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        script(program).main([*words, *QUIET, "--do_train", "--output_dir", str(tmp_path)])
    assert caught.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and said.endswith(". Local folders and files need no network.")
