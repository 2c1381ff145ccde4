"""What does a `Trainer` with LoRA-Pro add when it saves, writes its card and pushes?"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorapro_hf.hub.card import (
    CARD,
    add_to_card,
    content_of,
    kept_metadata,
    library_of,
    restore,
    without_card_of_peft,
    write_or_warn,
)
from lorapro_hf.hub.compose import CardFacts, compose_card, listed
from lorapro_hf.hub.describe import dataset_names, describe_lora_pro, describe_optimizer, name_on_hub
from lorapro_hf.hub.logs import final_evaluation
from lorapro_hf.hub.push import explained, make_branch, remedy
from lorapro_hf.hub.settings import Settings
from lorapro_hf.trainer.parents import accepted, handed
from lorapro_hf.trainer.parts import TrainerPart

# Names that `datasets` gives to data of local files.
_LOCAL = {"csv", "json", "text", "parquet", "arrow", "pandas", "generator", "imagefolder", "audiofolder", "webdataset"}

logger = logging.getLogger(__name__)


class HubMixin(TrainerPart):
    """The part of `LoRAProTrainerMixin` that adds `lorapro_config.json` and a model card to what is saved and pushed.

    A card that cannot be written is a warning.
    """

    _card_request: tuple[Mapping[str, Any], ModelCard | None] = ({}, None)
    _reported_of_cards: set[str] | None = None
    _explicit_branch: tuple[str, str | None] | None = None

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Save like the parent, with LoRA-Pro's settings, and our card instead of PEFT's."""
        if self.lora_pro_config is None or not self.args.should_save:
            super()._save(*args, **kwargs)
            return
        output_dir = kwargs.get("output_dir", args[0] if args else None)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        card = folder / CARD
        before, kept = content_of(card), None
        with contextlib.suppress(OSError):  # then the card stays as it is
            kept = kept_metadata(card)
        model: Any = self._bare_model
        if hasattr(model, "add_model_tags"):
            model.add_model_tags("lora-pro")  # PEFT and push_to_hub of the model take the tags of a card from there
        with without_card_of_peft(model):
            super()._save(*args, **kwargs)
        self._lora_pro_settings().save(folder)
        if kept is not None:
            from_parent = content_of(card) != before
            self._write_card(card, lambda: self._renew_card(folder, kept, from_parent))
        elif before is not None:
            restore(card, before)

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Write a model card, with the contents of the parent's; arguments as the parent's.

        A card that was edited by hand is left alone, with a warning. A parent of another library than transformers,
        PEFT and TRL keeps its own card, to which LoRA-Pro's settings are added. Without LoRA-Pro and methods the card
        is the parent's.
        """
        parent = super().create_model_card
        is_plain = self.lora_pro_config is None and not any(method.described() for method in self.lora_methods)
        if is_plain or not self.is_world_process_zero():
            return parent(*args, **kwargs)
        inspect.signature(parent).bind(*args, **kwargs)  # a wrong argument is an error, not a card that failed
        given = handed(type(self), HubMixin, "create_model_card", args, kwargs)
        card, made = Path(self.args.output_dir, CARD), None

        def write() -> None:
            nonlocal made
            card.parent.mkdir(parents=True, exist_ok=True)
            kept = kept_metadata(card)
            made = parent(*args, **kwargs)
            if not card.is_file():
                return
            if not library_of(card):
                self._card_request = (given, ModelCard.load(card, ignore_metadata_errors=True))
            self._renew_card(card.parent, kept, True)

        self._write_card(card, write)
        return made

    def _write_card(self, card: Path, write: Callable[[], None]) -> None:
        """Turn a failure of `write` into a warning, which is not repeated during a training."""
        if self._reported_of_cards is None or not self.is_in_train:
            self._reported_of_cards = set()
        write_or_warn(card, write, self._reported_of_cards)

    def _renew_card(self, folder: Path, kept: Mapping[str, Any], from_parent: bool) -> None:
        """Write the card of a folder with the last arguments of `create_model_card`; `kept` is its old metadata."""
        model, card = self._bare_model, folder / CARD
        settings = None if self.lora_pro_config is None else self._lora_pro_settings()
        if library_of(card):
            if from_parent and settings is not None:
                add_to_card(card, {**describe_lora_pro(model, settings), **describe_optimizer(settings)})
            return
        given, written = self._card_request
        facts = self._card_facts(given, written or ModelCard("---\n{}\n---\n"))
        facts.metadata = {**kept, **facts.metadata}
        if self._reported_of_cards is not None:
            facts.reported = self._reported_of_cards
        if folder.resolve() != Path(self.args.output_dir).resolve():
            facts.repo_id = None
            facts.with_picture = not folder.name.startswith(PREFIX_CHECKPOINT_DIR)  # drawing takes a second
        compose_card(model, settings, folder, facts)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push like the parent; make a missing branch, and let a failure say what is saved and what to do."""
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
        """Make the repository like the parent, and the branch of `hub_revision`; a failure says what to do."""
        if not getattr(self.args, "lora_pro", True):  # the parent's __init__ calls this before settings are resolved
            super().init_hf_repo(*args, **kwargs)
            return
        with explained("No repository was made."):
            super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            token = handed(type(self), HubMixin, "init_hf_repo", args, kwargs).get("token")
            with explained("The repository was made, but not its branch."):
                make_branch(self.hub_model_id, getattr(self.args, "hub_revision", None), token or self.args.hub_token)

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Push like the parent, which would leave out settings and card until the training has ended."""
        if self.lora_pro_config is not None and self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._report_failed_pushes()
            pending = getattr(self, "push_in_progress", None)
            if pending is None or pending.is_done() or self.args.hub_always_push:
                name = (self.hub_model_id or self.args.output_dir).split("/")[-1]
                self.create_model_card(**accepted(super().create_model_card, model_name=name))
                self._lora_pro_settings().save(Path(self.args.output_dir))
        super()._push_from_checkpoint(*args, **kwargs)

    def _finish_current_push(self) -> None:
        """Wait like the parent, and report pushes that failed in the background."""
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
        """The settings, from the optimizer once it exists."""
        if self._lora_pro_optimizer is not None:
            return Settings.of(self._lora_pro_optimizer)
        assert self.lora_pro_config is not None
        return Settings(self.lora_pro_config)

    def _card_facts(self, given: Mapping[str, Any], card: ModelCard) -> CardFacts:
        """The facts from the arguments of `create_model_card`, from the trainer and from the parent's card."""
        metadata, best = card.data.to_dict(), self.loaded_best_checkpoint
        stated = listed(given.get("dataset_tags")) or listed(given.get("dataset_name"))
        datasets = stated or dataset_names(self.train_dataset) or listed(metadata.get("datasets"))
        datasets = [name for name in datasets if name not in _LOCAL and name_on_hub(name)]
        if metadata.get("base_model") is None or given.get("finetuned_from") is None:
            metadata.pop("base_model", None)  # a path or nothing, if the model does not know better
        if isinstance(given.get("tasks"), str):
            metadata["pipeline_tag"] = given["tasks"]
        # the tags once more: PEFT, which the parent calls, drops tags that are not its own
        model_tags = getattr(self._bare_model, "model_tags", None)
        return CardFacts(
            repo_id=self.hub_model_id,
            model_name=given.get("model_name") or Path(self.args.output_dir).absolute().name,
            base_model=given.get("finetuned_from"),
            datasets=datasets,
            data=" and ".join(listed(given.get("dataset"))) or ("" if datasets else self._data()),
            evaluated_on=self._evaluated_on(given, datasets),
            log_history=self.state.log_history,
            metrics=final_evaluation(self.state.log_history, None if best is None else int(best.rsplit("-", 1)[-1])),
            hyperparameters=self._hyperparameters(),
            processing_class=self.processing_class,
            trained_with=self._trained_with(),
            tags=["generated_from_trainer", *listed(given.get("tags")), *listed(model_tags)],
            metadata=metadata,
            markdown=_markdown_of_parent(card.text),
        )

    def _hyperparameters(self) -> dict[str, str]:
        """The hyperparameters that transformers would list, but with the actual optimizer."""
        found = extract_hyperparameters_from_trainer(self)
        left_out = set() if self.lora_pro_config is None else {"optimizer"}
        left_out |= set() if self._lora_pro_optimizer is None else {"learning_rate"}
        found = {name: str(value) for name, value in found.items() if name not in left_out}
        found["max_grad_norm"] = str(self.args.max_grad_norm)
        if self.args.bf16:
            found["mixed_precision_training"] = "bfloat16"
        for method in self.lora_methods:
            found |= method.described()
        return {name.replace("_", " "): value for name, value in found.items()}

    def _data(self) -> str:
        try:
            return f"{len(self.train_dataset):,} examples" if self.train_dataset is not None else ""
        except TypeError:  # a stream
            return ""

    def _evaluated_on(self, given: Mapping[str, Any], datasets: list[str]) -> dict[str, str]:
        """The evaluation data for the metadata; empty if the data has no name on the Hub."""
        if not datasets:
            return {}
        configs, split = listed(given.get("dataset_args")), getattr(self.eval_dataset, "split", None)
        known = {
            "type": datasets[0],
            "name": next(iter(listed(given.get("dataset"))), datasets[0]),
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


def _markdown_of_parent(text: str) -> dict[str, list[str]]:
    """Badges of experiment trackers, the method's paper and citations in the card of another library."""
    cited = re.findall(r"^(Cite [^\n]+:)\s*\n\s*```bibtex\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    return {
        "badges": re.findall(r"\[<img [^\]\n]*\]\([^)\n]*\)", text),
        "sentences": [line.strip() for line in text.splitlines() if "a method introduced in" in line],
        "citations": [f"{title}\n\n```bibtex\n{entry.strip()}\n```" for title, entry in cited],
    }
