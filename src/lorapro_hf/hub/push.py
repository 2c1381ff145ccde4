"""How does a training without `Trainer` save its adapter, write its card and push both?"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, create_branch, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from lorapro_hf.checkpoints.adapters import require_pairs_saved
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.hub.card import CARD, is_ours, is_replaceable, keep_edited, without_card_of_peft
from lorapro_hf.hub.compose import Training, compose_card
from lorapro_hf.hub.describe import name_on_hub, numbers_of
from lorapro_hf.hub.failures import write_or_warn
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import LoRAProAdamW

logger = logging.getLogger(__name__)


def save_adapter(
    model: Any,
    settings: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None,
    folder: str | Path,
    *,
    processing_class: Any = None,
) -> None:
    """Save the adapter with `model.save_pretrained`, `lorapro_config.json` and a model card beside it.

    A card that is there already stays as it is. `create_model_card` writes one that tells of the training too.

    Args:
        model: a PEFT model, out of any wrapper of DDP or accelerate.
        settings: the optimizer of the training or, where it is gone, the settings of LoRA-Pro.
        folder: where to; made if need be.
        processing_class: a tokenizer or other processor to save with it.

    Raises:
        TypeError: the model is no PEFT model.
        ValueError: the adapter is not in the file that was written, since a wrapper has renamed parts of the model.
    """
    folder = Path(folder)
    _save_without_card(model, settings, folder, processing_class)

    def write() -> None:
        if not is_ours(folder / CARD) and is_replaceable(folder / CARD):
            create_model_card(model, settings, folder, processing_class=processing_class)

    write_or_warn(folder / CARD, write, set())


def _save_without_card(model: Any, settings: Any, folder: Path, processing_class: Any) -> None:
    _require_peft(model)
    with without_card_of_peft(model):
        model.save_pretrained(str(folder))
    require_pairs_saved(folder, model)
    if processing_class is not None:
        processing_class.save_pretrained(str(folder))
    Settings.of(settings).save(folder)


def create_model_card(
    model: Any,
    settings: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    processing_class: Any = None,
    tags: str | Sequence[str] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> ModelCard:
    """Write a model card, `README.md`, beside a saved adapter, with a picture of the training where it is logged.

    `LoRAProTrainer.create_model_card` does this for a trainer. A card that was edited by hand is kept under another
    name, of which a warning tells.

    Args:
        model: the PEFT model.
        settings: the optimizer of the training or, where it is gone, the settings of LoRA-Pro.
        folder: where the adapter lies.
        repo_id: the name under which the adapter will be on the Hub, for the title and the code that loads it.
        base_model: the base model's name on the Hub, where the model does not know it.
        datasets: names on the Hub of the data.
        metrics: results of the final evaluation, by name; by default those of `log_history`.
        log_history: what was logged, as `Trainer` does: `{"step": 10, "loss": 0.5}`, `{"step": 20, "eval_loss": 0.6}`.
        hyperparameters: what else there is to tell, such as `{"batch size": 8, "epochs": 3}`.
        processing_class: tokenizer or other processor, if it is saved in the same folder.
        tags: tags besides `lora-pro`, `lora` and `peft`.
        license: the adapter's license, as the Hub names it.
        language: language of the data.

    Returns:
        The card, as it was written.

    Raises:
        TypeError: the model is no PEFT model.
        FileNotFoundError: there is no such folder.
    """
    _require_peft(model)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write the card into; save the adapter there first.")
    metadata = keep_edited(folder)
    metadata |= {k: v for k, v in {"license": license, "language": language}.items() if v is not None}
    training = Training(
        model_name=(repo_id or folder.resolve().name).split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        datasets=[name for name in _listed(datasets) if name_on_hub(name)],
        metrics=numbers_of(metrics or {}),
        log_history=log_history,
        hyperparameters={name: str(value) for name, value in (hyperparameters or {}).items()},
        processor=processing_class,
        metadata={**metadata, "tags": _listed(tags)},
    )
    return compose_card(model, Settings.of(settings), folder, training)


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
    processing_class: Any = None,
    **about: Any,
) -> CommitInfo:
    """Save an adapter, write its card and push the folder to the Hub.

    ```python
    push_adapter(model, optimizer, "me/my-adapter", "out", processing_class=tokenizer, datasets="gsm8k")
    ```

    Args:
        model: the PEFT model.
        settings: the optimizer of the training or, where it is gone, the settings of LoRA-Pro.
        repo_id: where to on the Hub; made if need be.
        folder: the local folder whose content is pushed, without files and folders whose names begin with `_` and
            without checkpoints.
        private: whether a new repository is private; by default as the account or organization has it.
        token: an access token; by default the one of `hf auth login`.
        revision: the branch to commit to; made if need be.
        commit_message: the title of the commit.
        processing_class: a tokenizer or other processor to push with it.
        **about: passed on to `create_model_card`.

    Returns:
        The commit, with its address.

    Raises:
        TypeError: the model is no PEFT model.
        ValueError: the adapter is not in the file that was written. Nothing has been pushed.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; the message says what to do. The folder is
            complete then.
    """
    folder = Path(folder)
    _save_without_card(model, settings, folder, processing_class)
    about |= {"repo_id": repo_id, "processing_class": processing_class}
    inspect.signature(create_model_card).bind(model, settings, folder, **about)
    write_or_warn(folder / CARD, lambda: create_model_card(model, settings, folder, **about), set())
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
    """Make the branch of a push if the repository does not have it yet, as PEFT and transformers do."""
    if revision is not None and not revision.startswith("refs/"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)


@contextlib.contextmanager
def explained(consolation: str) -> Iterator[None]:
    """Let an error of the Hub say what is safe, and what to do; its type stays.

    Args:
        consolation: what has not been lost.
    """
    try:
        yield
    except Exception as error:
        text = f"{consolation} {remedy(error)}"
        if isinstance(error, HfHubHTTPError):
            error.append_to_message(f"\n\n{text}")
        else:
            logger.error("The push to the Hub failed. %s", text)
        raise


def remedy(error: BaseException) -> str:
    """What to do about a push that failed."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, RevisionNotFoundError):
        return "The repository has no such branch, tag or pull request: check the revision, and push again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 404):
        return (
            "The Hub does not know the access token, or the token may not see the repository: log in with `hf auth "
            "login`, or set HF_TOKEN or hub_token to a token with write access, check the name of the repository, and "
            "push again."
        )
    if status == 403:
        return (
            "The access token may not write there: give it write access at https://huggingface.co/settings/tokens, or "
            "choose a repository of your own account or organization (hub_model_id), and push again."
        )
    if status is not None and status < 500:
        return "The Hub did not accept what was sent, for the reason above."
    return "The Hub or the way to it is out of order: push again later."


def _require_peft(model: Any) -> None:
    if not getattr(model, "peft_config", None):
        raise TypeError(
            f"a {type(model).__name__} has no PEFT adapter to save. Pass the model that get_peft_model returned; one "
            "wrapped by DDP or accelerate as accelerator.unwrap_model(model)."
        )


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
