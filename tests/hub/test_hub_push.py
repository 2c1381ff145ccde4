"""Pushing with the real client to a Hub in this process, and loading again what was pushed with stock PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub, card_problems

pytestmark = pytest.mark.slow  # all of them read what one program of twenty seconds has pushed

SAVED = {"adapter_model.safetensors", "adapter_config.json", "lorapro_config.json"}
CARD = {"README.md", "training_curves.png"}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def pushed(hub: Hub, folder: Path) -> Any:
    hub.failures = {"writer/broken/commit": 501, "writer/broken-saves/commit": 501, "broken-storage.git": 403}
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "hub_jobs.py"), str(folder)]
    own = hub.environment(str(folder / "home"))  # a new home: downloads come from the server
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_save_pushes_adapter_settings_and_card(pushed: Any, hub: Hub) -> None:
    repository = hub.repositories["writer/every-save"]
    assert repository.private
    titles = [commit.title for commit in repository.commits]
    assert titles[0] == "initial commit" and titles[-1] == "End of training"
    assert titles[1] == "Training in progress, step 2"
    assert SAVED | {"README.md"} <= set(repository.commits[1].files)  # not only at the end
    assert SAVED | CARD | {"tokenizer.json"} <= set(repository.files)
    assert not [path for path in repository.files if path.startswith(("_", "checkpoint-"))]
    assert {"adapter_model.safetensors", "training_curves.png"} <= repository.large  # by LFS
    assert any("/preupload/" in request for request in hub.requests)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_pushed_card_has_what_the_arguments_said(pushed: Any, hub: Hub) -> None:
    repository = hub.repositories["writer/every-save"]
    text = repository.files["README.md"].decode()
    assert card_problems(text) == []
    data = hub.info("writer/every-save", repository, repository.commits[-1])["cardData"]
    assert data["license"] == "mit" and data["language"] == ["en"]
    assert data["datasets"] == ["someone/sums"] and "base_model" not in data
    assert {"arithmetic", "generated_from_trainer", "lora", "lora-pro", "peft"} <= set(data["tags"])
    (model,) = data["model-index"]
    assert model["name"] == "every-save"
    assert model["results"][0]["dataset"]["type"] == "someone/sums"
    assert model["results"][0]["metrics"][0]["type"] == "loss"
    assert 'adapter = "writer/every-save"' in text
    assert repository.files["training_curves.png"].startswith(b"\x89PNG")
    assert str(json.loads(repository.files["lorapro_config.json"])["learning_rate"]) == "0.01"


def test_repository_is_named_after_the_folder(pushed: Any, hub: Hub) -> None:
    repository = hub.repositories["writer/by-folder"]
    assert not repository.private
    assert [commit.title for commit in repository.commits] == ["initial commit", "Model save"]
    assert SAVED | {"README.md"} <= set(repository.files)


def test_plain_loop_pushes(pushed: Any, hub: Hub) -> None:
    repository = hub.repositories["writer/plain"]
    assert repository.commits[-1].sha == pushed["commit"]
    assert SAVED | {"README.md", "tokenizer.json"} <= set(repository.files)
    text = repository.files["README.md"].decode()
    assert "| mode | factored |" in text and "| batch size | 1 |" in text and "| accuracy | 0.5 |" in text
    assert card_problems(text) == [] and "value: 0.5" in text
    assert pushed["settings"]["mode"] == "factored" and pushed["settings"]["trust_region"] == 0.03


@pytest.mark.parametrize(
    ("name", "branch", "title"),
    [
        ("plain", "dev", "Upload a LoRA-Pro adapter"),
        ("branches", "saves/1", "Training in progress, step 1"),
        ("branches", "end", "Last"),
    ],
)
def test_missing_branch_is_made(pushed: Any, hub: Hub, name: str, branch: str, title: str) -> None:
    repository = hub.repositories[f"writer/{name}"]
    commits = repository.branches[branch]
    assert commits[-1].title == title and SAVED | {"README.md"} <= set(commits[-1].files)
    assert [commit.title for commit in repository.commits[1:]] == ([title] if name == "plain" else [])


def test_pushed_adapter_loads_with_stock_peft(pushed: Any, hub: Hub) -> None:
    loaded = pushed["loaded"]
    assert loaded["same"] and loaded["adapter"] == "writer/every-save"
    assert set(loaded["files"]) == set(hub.repositories["writer/every-save"].files)
    assert "lora-pro" in loaded["tags"]


@pytest.fixture(scope="module")
def failed(pushed: Any) -> Any:
    return pushed["failed"]


@pytest.mark.parametrize(
    ("name", "says"), [("unknown-token", ("401", "hf auth login")), ("stranger", ("403", "write access"))]
)
def test_refused_before_the_training(failed: Any, name: str, says: tuple[str, str]) -> None:
    assert "Error" in failed[name]["error"]
    assert all(each in failed[name]["message"] for each in (*says, "No repository was made"))


@pytest.mark.parametrize(
    ("name", "says"), [("broken", ("501", "push again later")), ("broken-storage", ("403", "write access"))]
)
def test_refused_after_the_training_loses_nothing(failed: Any, folder: Path, name: str, says: tuple[str, str]) -> None:
    assert failed[name]["error"] == "HfHubHTTPError"
    assert all(each in failed[name]["message"] for each in (*says, f"is in {folder / name}"))
    assert SAVED | {"README.md"} <= set(failed[name]["files"])


def test_refused_in_the_background_is_reported(failed: Any, folder: Path) -> None:
    outcome = failed["broken-saves"]
    assert outcome["error"] is None  # the training goes on
    assert SAVED | {"README.md", "checkpoint-1"} <= set(outcome["files"])
    (report,) = [line for line in outcome["logged"] if "failed" in line]
    assert "writer/broken-saves" in report and "501" in report and "trainer.push_to_hub()" in report
