"""How are many problems solved, with every answer kept on the way?"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from lorapro_hf.commands.common.generation import Completion, check_room, complete
from lorapro_hf.commands.evaluate.models import this_process
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json

Sample = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A prompt, and what else its sample says (the reference answer)."""

    id: str
    prompt: str
    more: Mapping[str, Any]


@dataclass(frozen=True)
class Solving:
    """How problems are solved.

    Args:
        batch_size: problems at a time on each process.
        max_new_tokens: the most tokens of an answer.
        samples_file: where each sample goes as a line of JSON as soon as it is there; `None` for nowhere.
        resume: whether to take over what `samples_file` holds; otherwise it must not exist.
        start: called with the number of problems that are left to solve.
        advance: called with the number of problems that have just been solved.
    """

    batch_size: int = 8
    max_new_tokens: int = 512
    samples_file: Path | None = None
    resume: bool = False
    start: Callable[[int], None] = lambda count: None
    advance: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.resume and self.samples_file is None:
            raise UsageError("resume needs the samples_file of the evaluation that it goes on with.")


def solve(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    judge: Callable[[Sequence[Problem], Sequence[Completion]], list[Sample]],
    solving: Solving,
    stop: Collection[str] = (),
    add_special_tokens: bool = True,
) -> list[Sample]:
    """A sample for each problem, in their order.

    A sample has `id`, `prompt`, `text`, `finished`, and what `problem.more` and `judge` say. Under `accelerate launch`
    each process has the whole model and solves its share; all return all samples.

    Args:
        model: a causal language model, with an adapter or without.
        tokenizer: the model's; one without a padding token pads with its end-of-sequence token.
        problems: what is asked, ids all different.
        judge: what a batch's completions are worth, a mapping for each.
        solving: sizes and files.
        stop: strings that end an answer.
        add_special_tokens: whether the prompts still lack the tokens that open a text.

    Raises:
        UsageError: a prompt is too long for the model, or the samples file is there already or of another evaluation.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer([problem.prompt for problem in problems], add_special_tokens=add_special_tokens)["input_ids"]
    lengths = {problem.id: len(ids) for problem, ids in zip(problems, encoded, strict=True)}
    check_room(model, lengths.values(), solving.max_new_tokens)
    mark = fingerprint(model, {"max_new_tokens": solving.max_new_tokens, "stop": sorted(stop)})
    process = this_process()
    samples = _found(solving, problems, mark)
    process.wait_for_everyone()  # before one of them writes
    # the longest first: what does not fit into memory fails at once, and alike lengths share a batch
    left = sorted((p for p in problems if p.id not in samples), key=lambda p: (-lengths[p.id], p.id))
    solving.start(len(left))
    was_training = model.training
    model.eval()
    try:
        for share in _batches(left, solving.batch_size * process.num_processes):
            own = share[process.process_index :: process.num_processes]
            prompts = [problem.prompt for problem in own]
            texts = complete(model, tokenizer, prompts, solving.max_new_tokens, stop, add_special_tokens) if own else []
            new = [
                {**_basis(problem, mark), "text": text.text, "finished": text.finished, **verdict}
                for problem, text, verdict in zip(own, texts, judge(own, texts), strict=True)
            ]
            everyones: list[Sample] = gather_object(new)
            samples |= {sample["id"]: sample for sample in everyones}
            if process.is_main_process and solving.samples_file is not None:
                _append(solving.samples_file, everyones)
            solving.advance(len(everyones))
    finally:
        model.train(was_training)
    return [samples[problem.id] for problem in problems]


def fingerprint(model: Any, settings: Mapping[str, Any]) -> str:
    """Tells evaluations apart whose samples must not be mixed: by base model, adapter's weights and `settings`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = getattr(base.config, "quantization_config", None)
    known = [getattr(base, "name_or_path", ""), str(base.dtype), str(quantization), sorted(settings.items())]
    digest = hashlib.sha256(json.dumps(known, default=str).encode())
    if isinstance(model, PeftModel):
        for name, value in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def share_of(samples: Sequence[Sample], key: str) -> tuple[float, float | None]:
    """The share of samples for which `key` holds and its standard error, which one sample does not have."""
    share = sum(bool(sample[key]) for sample in samples) / len(samples)
    return share, math.sqrt(share * (1 - share) / (len(samples) - 1)) if len(samples) > 1 else None


def _basis(problem: Problem, mark: str) -> Sample:
    return {"id": problem.id, "prompt": problem.prompt, **problem.more, "fingerprint": mark}


def _batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _append(path: Path, samples: Sequence[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


def _found(solving: Solving, problems: Sequence[Problem], mark: str) -> dict[str, Sample]:
    """The samples of an earlier, unfinished evaluation of the same model on the same prompts."""
    path = solving.samples_file
    if path is None or not path.exists():
        return {}
    if not solving.resume:
        raise UsageError(f"{path} is there already: go on with it by --resume, or name another file by --output.")
    asked = {problem.id: _basis(problem, mark) for problem in problems}
    samples = {}
    text = path.read_bytes().decode(errors="replace")
    whole, _, broken = text.rpartition("\n")
    for line in filter(None, whole.split("\n")):  # a text may hold what splitlines() takes for a line's end
        sample = parse_json(line)
        same = asked.get(sample["id"])
        if same is None:
            continue  # of a larger evaluation
        if any(sample.get(key) != value for key, value in same.items()):
            raise UsageError(
                f"{path} was written with another model, adapter or other settings: its problem {sample['id']} was not "
                "asked like this. Use the same as then, or name another file by --output."
            )
        samples[sample["id"]] = sample
    if broken and this_process().is_main_process:  # a line that was cut off
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return samples
