"""What does a `Trainer` with LoRA-Pro add when it saves, writes its card and pushes?"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.hub.card import (
    CARD,
    add_to_card,
    content_of,
    is_replaceable,
    keep_edited,
    library_of,
    without_card_of_peft,
)
from lorapro_hf.hub.compose import Training, compose_card
from lorapro_hf.hub.describe import dataset_names, describe_lora_pro, describe_optimizer, name_on_hub
from lorapro_hf.hub.failures import write_or_warn
from lorapro_hf.hub.push import explained, make_branch, remedy
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.trainer.parents import accepted, handed
from lorapro_hf.utils.text_files import replace_file

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_GENERIC = {
    "csv",
    "json",
    "text",
    "parquet",
    "arrow",
    "pandas",
    "generator",
    "imagefolder",
    "audiofolder",
    "webdataset",
}

logger = logging.getLogger(__name__)


class HubMixin(_Base):
    """The part of `LoRAProTrainerMixin` that saves and pushes; while LoRA-Pro is off it is the parent.

    Each saved folder gets a `lorapro_config.json` and a model card. A card that cannot be written is a warning.
    """

    lora_pro_config: LoRAProConfig | None = None
    loaded_best_checkpoint: str | None = None
    """The checkpoint whose weights the model has since the end of a training; `None` where it has the last step's."""
    _card_request: tuple[Mapping[str, Any], ModelCard | None] = ({}, None)
    _reported_of_cards: set[str] | None = None
    _explicit_branch: tuple[str, str | None] | None = None

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, with the settings and a card of our own in the place of PEFT's."""
        if self.lora_pro_config is None or not self.args.should_save:
            super()._save(*args, **kwargs)
            return
        output_dir = kwargs.get("output_dir", args[0] if args else None)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        card = folder / CARD
        before, replaceable = content_of(card), is_replaceable(card)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags("lora-pro")  # PEFT and push_to_hub of the model take the tags of a card from there
        with without_card_of_peft(model):
            super()._save(*args, **kwargs)
        is_new = content_of(card) != before
        if is_new and not replaceable and before is not None:
            replace_file(card, before)
        self._lora_pro_settings().save(folder)

        def write() -> None:
            if is_new and library_of(card):
                self._add_to_card(folder)
            else:
                self._compose_card(folder)

        if replaceable:
            self._write_card(card, write)

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Write a model card, with what the parent's would say; arguments as the parent's.

        A card that was edited by hand is kept under another name, of which a warning tells. A parent of another library
        than transformers, PEFT and TRL keeps its own card, to which LoRA-Pro's settings are added.
        """
        parent = super().create_model_card
        if self.lora_pro_config is None or not self.is_world_process_zero():
            return parent(*args, **kwargs)
        inspect.signature(parent).bind(*args, **kwargs)  # what the parent does not take is the caller's to mend
        given = handed(type(self), HubMixin, "create_model_card", args, kwargs)
        folder, made = Path(self.args.output_dir), None

        def write() -> None:
            nonlocal made
            folder.mkdir(parents=True, exist_ok=True)
            kept = keep_edited(folder)
            made = parent(*args, **kwargs)
            if not (folder / CARD).is_file():
                return
            if library_of(folder / CARD):
                self._add_to_card(folder)
                return
            self._card_request = (given, ModelCard.load(folder / CARD, ignore_metadata_errors=True))
            self._compose_card(folder, kept)

        self._write_card(folder / CARD, write)
        return made

    def _write_card(self, card: Path, write: Callable[[], None]) -> None:
        """Turn a failure of `write` into a warning, which is not repeated during a training."""
        if self._reported_of_cards is None or not self.is_in_train:
            self._reported_of_cards = set()
        write_or_warn(card, write, self._reported_of_cards)

    def _compose_card(self, folder: Path, kept: Mapping[str, Any] | None = None) -> None:
        """Write the card of a saved folder, with what `create_model_card` was told last.

        Args:
            folder: where the adapter lies.
            kept: metadata of an earlier card; by default that of the card in the folder, which must be replaceable.
        """
        given, written = self._card_request
        kept = keep_edited(folder) if kept is None else kept
        training = self._told(given, written or ModelCard("---\n{}\n---\n"))
        training.metadata = {**kept, **training.metadata}
        if self._reported_of_cards is not None:
            training.reported = self._reported_of_cards
        if folder.resolve() != Path(self.args.output_dir).resolve():
            training.repo_id = None
            training.with_picture = not folder.name.startswith(PREFIX_CHECKPOINT_DIR)  # which takes a second to draw
        compose_card(self.accelerator.unwrap_model(self.model), self._lora_pro_settings(), folder, training)

    def _add_to_card(self, folder: Path) -> None:
        """Add LoRA-Pro's settings to the card of another library."""
        model, settings = self.accelerator.unwrap_model(self.model), self._lora_pro_settings()
        add_to_card(folder, {**describe_lora_pro(model, settings), **describe_optimizer(settings)})

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent, but a branch that is missing is made; a failure says what is saved and what to do."""
        if self.lora_pro_config is None:
            return super().push_to_hub(*args, **kwargs)
        given = handed(type(self), HubMixin, "push_to_hub", args, kwargs)
        if given.get("revision") is not None:
            self._explicit_branch = (given["revision"], given.get("token") or self.args.hub_token)
        try:
            with explained(f"What was to be pushed is in {self.args.output_dir}."):
                return super().push_to_hub(*args, **kwargs)
        finally:
            self._explicit_branch = None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, and the branch of `hub_revision` is made; a failure says what to do."""
        if not getattr(self.args, "lora_pro", True):  # the parent's __init__ asks, before anything is resolved
            super().init_hf_repo(*args, **kwargs)
            return
        with explained("No repository was made."):
            super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            token = handed(type(self), HubMixin, "init_hf_repo", args, kwargs).get("token")
            with explained("The repository was made, but not its branch."):
                make_branch(self.hub_model_id, getattr(self.args, "hub_revision", None), token or self.args.hub_token)

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, which pushes neither settings nor card before the training has ended."""
        if self.lora_pro_config is not None and self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._report_failed_pushes()
            pending = getattr(self, "push_in_progress", None)
            if pending is None or pending.is_done() or self.args.hub_always_push:
                name = (self.hub_model_id or self.args.output_dir).split("/")[-1]
                self.create_model_card(**accepted(super().create_model_card, model_name=name))
                self._lora_pro_settings().save(Path(self.args.output_dir))
        super()._push_from_checkpoint(*args, **kwargs)

    def _finish_current_push(self) -> None:
        """As the parent, which says nothing of pushes that failed in the background."""
        super()._finish_current_push()
        if self.lora_pro_config is not None:
            self._report_failed_pushes()
        if self._explicit_branch is not None:  # only now: the adapter and its card have been saved
            make_branch(self.hub_model_id, *self._explicit_branch)

    def _report_failed_pushes(self) -> None:
        pending = getattr(self, "push_in_progress", None)
        if pending is None:
            return
        for job in [job for job in pending.jobs if job.done() and not job.cancelled()]:
            error = job.exception()
            if error is not None:
                logger.error(
                    "A push to %s during the training failed: %s\n\nThe checkpoints are in %s. %s Then call "
                    "trainer.push_to_hub().",
                    self.hub_model_id,
                    error,
                    self.args.output_dir,
                    remedy(error),
                )
                pending.jobs.remove(job)

    def _lora_pro_settings(self) -> Settings:
        """From the optimizer once there is one."""
        optimizer = unwrap_optimizer(self.optimizer)
        if isinstance(optimizer, LoRAProAdamW):
            return Settings.of(optimizer)
        assert self.lora_pro_config is not None
        return Settings(self.lora_pro_config)

    def _told(self, given: Mapping[str, Any], card: ModelCard) -> Training:
        """What arguments of `create_model_card`, trainer and the parent's own card say."""
        args, state, metadata = self.args, self.state, card.data.to_dict()
        best = self.loaded_best_checkpoint
        stated = _listed(given.get("dataset_tags")) or _listed(given.get("dataset_name"))
        datasets = stated or dataset_names(self.train_dataset) or _listed(metadata.get("datasets"))
        datasets = [name for name in datasets if name not in _GENERIC and name_on_hub(name)]
        model_name = given.get("model_name") or Path(args.output_dir).absolute().name
        # once more: PEFT, which the parent calls, drops tags that are not its own
        model_tags = getattr(self.accelerator.unwrap_model(self.model), "model_tags", None)
        own_tags = ["generated_from_trainer", *_listed(given.get("tags")), *_listed(model_tags)]
        metadata["tags"] = [*_listed(metadata.get("tags")), *own_tags]
        if metadata.get("base_model") is None or given.get("finetuned_from") is None:
            metadata.pop("base_model", None)  # a path or nothing, where the model does not know better
        if isinstance(given.get("tasks"), str):
            metadata["pipeline_tag"] = given["tasks"]
        return Training(
            model_name=model_name,
            repo_id=self.hub_model_id,
            base_model=given.get("finetuned_from"),
            datasets=datasets,
            data=" and ".join(_listed(given.get("dataset"))) or ("" if datasets else self._data()),
            evaluated_on=self._evaluated_on(given, datasets),
            log_history=state.log_history,
            best_step=int(best.rsplit("-", 1)[-1]) if best is not None else None,
            hyperparameters=self._hyperparameters(),
            processor=self.processing_class,
            trained_with=self._trained_with(),
            metadata=metadata,
            **_of_parents_text(card.text),
        )

    def _hyperparameters(self) -> dict[str, str]:
        """Those that transformers would list, but with the optimizer that is used."""
        found = extract_hyperparameters_from_trainer(self)
        optimizer = unwrap_optimizer(self.optimizer)
        left_out = {"optimizer", "learning_rate"} if isinstance(optimizer, LoRAProAdamW) else {"optimizer"}
        found = {name: str(value) for name, value in found.items() if name not in left_out}
        found["max_grad_norm"] = str(self.args.max_grad_norm)
        if self.args.bf16:
            found["mixed_precision_training"] = "bfloat16"
        return {name.replace("_", " "): value for name, value in found.items()}

    def _data(self) -> str:
        try:
            return f"{len(self.train_dataset):,} examples" if self.train_dataset is not None else ""
        except TypeError:  # a stream
            return ""

    def _evaluated_on(self, given: Mapping[str, Any], datasets: list[str]) -> dict[str, str]:
        """For the metadata of the results; nothing is made up where the data has no name."""
        if not datasets:
            return {}
        names = _listed(given.get("dataset"))
        configs = _listed(given.get("dataset_args"))
        split = getattr(self.eval_dataset, "split", None)
        known = {
            "type": datasets[0],
            "name": names[0] if names else datasets[0],
            "config": configs[0] if configs else getattr(self.eval_dataset, "config_name", None),
            "split": str(split) if split is not None else None,
        }
        return {name: value for name, value in known.items() if value}

    def _trained_with(self) -> str:
        for cls in type(self).__mro__:
            if cls.__module__.startswith("trl."):
                method = getattr(self, "_name", None) or cls.__name__.removesuffix("Trainer")
                return f"[TRL](https://github.com/huggingface/trl)'s {method}"
        return ""


def _of_parents_text(text: str) -> dict[str, Any]:
    """What other libraries want to be in a card: badges of experiment trackers, the method's paper, citations."""
    cited = re.findall(r"^(Cite [^\n]+:)\s*\n\s*```bibtex\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    badges = [badge for line in text.splitlines() for badge in re.findall(r"\[<img [^\]]*\]\([^)]*\)", line)]
    sentences = [line.strip() for line in text.splitlines() if "a method introduced in" in line]
    citations = [f"{title}\n\n```bibtex\n{entry.strip()}\n```" for title, entry in cited]
    return {"badges": badges, "sentences": sentences, "citations": citations}


def _listed(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [each for each in value if each]
