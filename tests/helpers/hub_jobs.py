"""What the tests of the Hub run in a process of its own, whose endpoint is the server in hub_server.py.

`python hub_jobs.py FOLDER` prints one line of JSON, the last.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT = torch.arange(3, 11)[None]


def push(folder: Path) -> dict[str, Any]:
    """Train and push in every way that works."""
    from hub_helpers import model_of, tokenizer, trainer_of
    from lorapro_hf import create_lorapro_optimizer
    from lorapro_hf.hub import load_lora_pro_config, push_adapter

    model = model_of(folder / "base")
    saving = ["--save_steps", "2", "--hub_private_repo", "true", "--hub_model_id", "writer/every-save"]
    trainer = trainer_of(folder / "every", model, [*saving, "--eval_strategy", "steps", "--eval_steps", "2"])
    trainer.train()
    about = {"dataset_tags": "someone/sums", "dataset": "Sums", "language": "en", "license": "mit"}
    trainer.push_to_hub(**about, tags="arithmetic")
    with torch.no_grad():
        torch.save(model.eval()(PROMPT).logits, folder / "logits.pt")

    trainer = trainer_of(folder / "by-folder", model_of(folder / "base"), ["--hub_strategy", "end", "--max_steps", "1"])
    trainer.train()
    trainer.save_model()  # pushes, as the arguments say

    model = model_of(folder / "base")
    optimizer = create_lorapro_optimizer(model, lr=1e-3, config={"mode": "factored", "trust_region": 0.03})
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    about = {"datasets": "someone/sums", "hyperparameters": {"batch size": 1}, "metrics": {"accuracy": 0.5}}
    commit = push_adapter(model, optimizer, "writer/plain", folder / "plain", processing_class=tokenizer(), **about)
    push_adapter(model, optimizer, "writer/plain", folder / "plain", revision="dev")

    flags = ["--max_steps", "1", "--save_steps", "1", "--hub_model_id", "writer/branches", "--hub_revision", "saves/1"]
    trainer = trainer_of(folder / "branches", model_of(folder / "base"), flags)
    trainer.train()
    trainer.push_to_hub("Last", revision="end")
    settings = load_lora_pro_config("writer/plain").to_dict()
    return {"commit": commit.oid, "settings": settings, "failed": fail(folder), "loaded": load(folder)}


def fail(folder: Path) -> dict[str, Any]:
    """Push in ways that fail, each with a training behind it that must not be lost."""
    from hub_helpers import model_of, trainer_of

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lorapro_hf").addHandler(handler)
    outcomes: dict[str, Any] = {}

    def attempt(name: str, flags: list[str], act: Callable[[Any], Any]) -> None:
        try:
            act(trainer_of(folder / name, model_of(folder / "base"), ["--max_steps", "1", *flags]))
            outcomes[name] = {"error": None}
        except Exception as error:
            outcomes[name] = {"error": type(error).__name__, "message": str(error)}
        outcomes[name]["files"] = sorted(path.name for path in (folder / name).glob("*"))
        outcomes[name]["logged"], heard[:] = list(heard), []

    def train_and_push(trainer: Any) -> None:
        trainer.train()
        trainer.push_to_hub()

    at_end = ["--hub_strategy", "end"]
    attempt("unknown-token", [*at_end, "--hub_token", "hf_nobody"], train_and_push)
    attempt("stranger", [*at_end, "--hub_model_id", "writer/of-another", "--hub_token", "hf_stranger"], train_and_push)
    attempt("broken", [*at_end, "--hub_model_id", "writer/broken"], train_and_push)
    attempt("broken-storage", [*at_end, "--hub_model_id", "writer/broken-storage"], train_and_push)
    every_save = ["--save_steps", "1", "--hub_model_id", "writer/broken-saves"]
    attempt("broken-saves", every_save, lambda trainer: trainer.train())
    return outcomes


def load(folder: Path) -> dict[str, Any]:
    """Load what was pushed as the card says, without this package, which cannot be imported from here on."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lorapro_hf"]:
        del sys.modules[name]
    sys.modules["lorapro_hf"] = None  # type: ignore[assignment]
    from huggingface_hub import ModelCard, snapshot_download

    card = ModelCard.load("writer/every-save")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/the/base/model", str(folder / "base")), names)
    with torch.no_grad():
        logits = names["model"](PROMPT).logits
    files = sorted(path.name for path in Path(snapshot_download("writer/every-save")).iterdir())
    same = torch.equal(logits, torch.load(folder / "logits.pt", weights_only=True))
    return {"same": same, "adapter": names["adapter"], "files": files, "tags": card.data.tags}


if __name__ == "__main__":
    import hub_helpers  # noqa: F401

    gc.freeze()  # each training looks through what is not frozen
    torch.set_num_threads(1)
    print(json.dumps(push(Path(sys.argv[1]))))
