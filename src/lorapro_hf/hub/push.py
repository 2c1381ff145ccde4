"""How does a training without `Trainer` save its adapter, write its card and push both?"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, create_branch, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from lorapro_hf.checkpoints.adapters import require_pairs_saved
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.hub.card import CARD, kept_metadata, without_card_of_peft, write_or_warn
from lorapro_hf.hub.compose import CardFacts, compose_card
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import LoRAProAdamW

_UNKNOWN = (
    "The Hub does not know the access token, or the token may not see the repository: log in with `hf auth login`, or "
    "set HF_TOKEN or hub_token to a token with write access, check the name of the repository, and push again."
)
_REMEDIES = {
    401: _UNKNOWN,
    403: "The access token may not write there: give it write access at https://huggingface.co/settings/tokens, or "
    "choose a repository of your own account or organization (hub_model_id), and push again.",
    404: _UNKNOWN,
}

logger = logging.getLogger(__name__)


def save_adapter(
    model: Any,
    settings: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None,
    folder: str | Path,
    *,
    processing_class: Any = None,
) -> None:
    """Save the adapter with `model.save_pretrained`, `lorapro_config.json` and a model card beside it.

    An existing card stays as it is. `create_model_card` writes one that also describes the training.

    Args:
        model: The PEFT model, out of any wrapper of DDP or accelerate.
        settings: The optimizer of the training or, if it is gone, the settings of LoRA-Pro.
        folder: The target, made if need be.
        processing_class: A tokenizer or other processor to save with it.

    Raises:
        TypeError: The model is no PEFT model.
        ValueError: The written file lacks the adapter, because a wrapper has renamed parts of the model.
    """
    folder = Path(folder)
    _save_without_card(model, settings, folder, processing_class)
    if not (folder / CARD).exists():
        write_or_warn(
            folder / CARD,
            lambda: create_model_card(model, settings, folder, processing_class=processing_class),
            set(),
        )


def create_model_card(
    model: Any,
    settings: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None,
    folder: str | Path,
    **facts: Any,
) -> ModelCard:
    """Write a model card, `README.md`, beside a saved adapter, with a picture of the logged losses, and return it.

    Args:
        model: The PEFT model.
        settings: The optimizer of the training or, if it is gone, the settings of LoRA-Pro.
        folder: The folder of the adapter.
        **facts: Fields of `CardFacts`, such as `datasets`, `log_history`, `license` and `repo_id`.

    Raises:
        TypeError: The model is no PEFT model, or `CardFacts` has no such field.
        FileNotFoundError: There is no such folder.
        FileExistsError: The existing card was edited by hand or written by another program. It is left as it is.
    """
    _require_peft(model)
    folder, about = Path(folder), CardFacts(**facts)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write the card into; save the adapter there first.")
    about.metadata = {**kept_metadata(folder / CARD), **about.metadata}
    return compose_card(model, Settings.of(settings), folder, about)


def push_adapter(
    model: Any,
    settings: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None,
    repo_id: str,
    folder: str | Path,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a LoRA-Pro adapter",
    **facts: Any,
) -> CommitInfo:
    """Save an adapter, write its card, push the folder to the Hub, and return the commit.

    Args:
        model: The PEFT model.
        settings: The optimizer of the training or, if it is gone, the settings of LoRA-Pro.
        repo_id: The repository on the Hub; made if need be.
        folder: The local folder to push. Names that begin with `_` and checkpoints are left out.
        private: Whether a new repository is private; by default as the account or organization has it.
        token: An access token; by default that of `hf auth login`.
        revision: The branch to commit to; made if need be.
        commit_message: The title of the commit.
        **facts: Fields of `CardFacts`. A tokenizer or other processor, `processing_class=`, is pushed too.

    Raises:
        TypeError: The model is no PEFT model, or `CardFacts` has no such field.
        ValueError: The written file lacks the adapter. Nothing has been pushed.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused; the message names the remedy.
    """
    folder, facts = Path(folder), {**facts, "repo_id": repo_id}
    CardFacts(**facts)  # a wrong name is refused before anything is written
    _save_without_card(model, settings, folder, facts.get("processing_class"))
    write_or_warn(folder / CARD, lambda: create_model_card(model, settings, folder, **facts), set())
    with explained(f"The adapter and its card are complete in {folder}."):
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True)
        make_branch(repo.repo_id, revision, token)
        return upload_folder(
            repo_id=repo.repo_id,
            folder_path=str(folder),
            commit_message=commit_message,
            token=token,
            revision=revision,
            ignore_patterns=["_*", "checkpoint-*"],
        )


def make_branch(repo_id: str, revision: str | None, token: str | None) -> None:
    """Make the branch of a push if the repository does not have it yet."""
    if revision is not None and not revision.startswith("refs/"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)


@contextlib.contextmanager
def explained(saved: str) -> Iterator[None]:
    """Add the sentence `saved`, about the files that are safe, and the remedy to an error of the Hub."""
    try:
        yield
    except Exception as error:
        text = f"{saved} {remedy(error)}"
        if isinstance(error, HfHubHTTPError):
            error.append_to_message(f"\n\n{text}")
        else:
            logger.error("The push to the Hub failed. %s", text)
        raise


def remedy(error: BaseException) -> str:
    """Return the remedy for a push that failed."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, RevisionNotFoundError):
        return "The repository has no such branch, tag or pull request: check the revision, and push again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
    if status < 500:
        return _REMEDIES.get(status, "The Hub did not accept the files, for the reason above.")
    return "The Hub or the connection to it failed: push again later."


def _save_without_card(model: Any, settings: Any, folder: Path, processing_class: Any) -> None:
    _require_peft(model)
    with without_card_of_peft(model):
        model.save_pretrained(str(folder))
    require_pairs_saved(folder, model)
    if processing_class is not None:
        processing_class.save_pretrained(str(folder))
    Settings.of(settings).save(folder)


def _require_peft(model: Any) -> None:
    if not getattr(model, "peft_config", None):
        raise TypeError(
            f"a {type(model).__name__} has no PEFT adapter to save. Pass the model that get_peft_model returned; one "
            "wrapped by DDP or accelerate as accelerator.unwrap_model(model)."
        )
