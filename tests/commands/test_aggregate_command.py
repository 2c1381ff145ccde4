"""`lorapro aggregate` prints a table and writes an adapter that stock PEFT loads; bad input writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lorapro_hf import aggregate_adapters, cli
from trainer_helpers import tiny_base


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clients")
    for number in range(2):
        settings: dict[str, Any] = {"r": 2 + 2 * number, "rank_pattern": {"v_proj": 3}, "use_rslora": bool(number)}
        for name, ranks in (("same", {"rank_pattern": {"v_proj": 3}}), ("other", settings)):
            config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **ranks})
            base = tiny_base()  # which sets the seed
            torch.manual_seed(number)
            get_peft_model(base, config).save_pretrained(folder / f"{name}{number}")
    return [str(folder / name) for name in ("same0", "same1", "other0", "other1")]


def logits(*folders: str | Path) -> list[torch.Tensor]:
    ids = torch.arange(8).view(1, 8)
    return [PeftModel.from_pretrained(tiny_base(), str(each)).eval()(ids).logits.detach() for each in folders]


def test_adapter_table_and_card(clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "new" / "global"
    assert cli.main(["aggregate", *clients[:2], "--weights", "3", "1", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "rank", "cosine:", "mean", "fair", "length"]
    assert lines[1].split()[:2] == ["model.layers.0.self_attn.q_proj", "2"] and lines[2].split()[1] == "3"
    plain, fair = (float(each) for each in lines[1].split()[2:4])
    assert 0 < plain < fair < 1
    assert lines[-3].startswith("4 layers: mean cosine") and lines[-1] == f"Adapter: {output}"
    state = load_file(output / "adapter_model.safetensors")
    expected = aggregate_adapters(clients[:2], [3, 1])
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    card = ModelCard.load(output / "README.md")
    assert "| `same0` | 0.75 |" in card.text and "objective `cosine` and λ = 0.01" in card.text
    about = card.data.to_dict()
    assert about["library_name"] == "peft" and "federated-learning" in about["tags"]
    (found,) = logits(output)
    assert not torch.equal(found, logits(clients[0])[0])


def test_other_ranks_and_scalings_are_loaded_by_peft(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--method", "exact", "--weights", "0", "1", "--output", str(tmp_path / "a"), "--json"]
    assert cli.main(["aggregate", *clients[2:], *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["rank"] for layer in report["layers"]] == [6, 6] * 2 and report["method"] == "exact"
    assert report["layers"][0]["mean_cosine"] is None and report["layers"][1]["mean_cosine"] > 0
    torch.testing.assert_close(*logits(tmp_path / "a", clients[3]))  # the one with all the weight


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["2", "3"], "model.layers.0.self_attn.q_proj has rank 2 in CLIENTS/other0 and 4 in CLIENTS/other1"),
        (["0", "1", "--weights", "1"], "1 weights do not fit 2 adapters"),
        (["0", "1", "--weights", "1", "-1"], "must be 0 or positive"),
        (["0", "1", "--method", "mean", "--lam", "1"], "--lam is for --method fair: leave it out with --method mean"),
        (["0", "1", "--rank", "2"], 'rank is for the method "exact"'),
    ],
)
def test_bad_input_writes_nothing(
    words: list[str], said: str, clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [clients[int(word)] if place < 2 else word for place, word in enumerate(words)]
    code = cli.main(["aggregate", *words, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert code == 2 and said.replace("CLIENTS", str(Path(clients[0]).parent)) in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_with_files_is_refused(clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").touch()
    assert cli.main(["aggregate", *clients[:2], "--output", str(tmp_path)]) == 2
    assert "exists and is not empty: name a new folder" in capsys.readouterr().err
    assert cli.main(["aggregate", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "has no adapter_config.json: name the folder" in capsys.readouterr().err
