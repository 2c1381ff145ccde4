r"""Fine-tune a speech model such as wav2vec 2.0 to transcribe speech by CTC with LoRA-Pro.

    python scripts/run_speech_recognition.py --model_name_or_path facebook/wav2vec2-base \
        --dataset_name openslr/librispeech_asr --dataset_config_name clean --train_split train.100 \
        --do_train --do_eval --learning_rate 1e-4 --output_dir runs/librispeech

For your own recordings, write a table (`--train_file`): its column `audio` names WAV, FLAC or OGG files, relative to
the table, and its column `text` has the words. A model without a vocabulary gets the letters of the training set.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

import io
import json
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, Wav2Vec2CTCTokenizer
from transformers.hf_argparser import HfArg

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.options import UsageError, require_packages
from lorapro_hf.recipes.cells import complete_rows, require_columns, with_texts
from lorapro_hf.recipes.data import DataArguments, keep_all_of, load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.metrics import load_metric
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, add_adapter, load_model, load_processor
from lorapro_hf.recipes.parser import RecipeParser

with one_line_errors():
    require_packages("run_speech_recognition.py", "soundfile", "scipy", extra="scripts")
    import soundfile
    from scipy.signal import resample_poly


@dataclass
class SpeechArguments(DataArguments):
    """The data set of recordings and their words."""

    audio_column_name: str = HfArg(default="audio", help="Column with recordings, or paths of files.")
    text_column_name: str = HfArg(default="text", help="Column with the words.")
    max_duration_in_seconds: float = HfArg(default=20.0, help="Drop longer recordings.")
    text_case: str | None = HfArg(
        default=None, help="Change the words to this case.", metadata={"choices": ["lower", "upper"]}
    )


def recordings(rows: Dataset, split: str, data: SpeechArguments) -> Dataset:
    """Return the columns `audio` (not decoded, for soundfile) and `text` without blank rows."""
    names = {data.audio_column_name: "audio", data.text_column_name: "text"}
    require_columns(rows, names, " Name them by --audio_column_name and --text_column_name.")
    where, keep_all = f"the {split} set", keep_all_of(split)
    rows = complete_rows(rows.select_columns([*names]), (data.audio_column_name,), where, keep_all=keep_all)
    rows = with_texts(rows, (data.text_column_name,), where, keep_all=keep_all, map_kwargs=data.map_kwargs)
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    if data.text_case is not None:
        turned = str.lower if data.text_case == "lower" else str.upper
        rows = rows.map(lambda text: {"text": turned(text)}, input_columns="text", **data.map_kwargs)
    return rows.cast_column("audio", Audio(decode=False)) if isinstance(rows.features["audio"], Audio) else rows


def waveform(audio: Any, folder: Path, rate: int) -> np.ndarray:
    """Return one channel at the given rate, from a path or a cell of an `Audio` column."""
    stored = {"path": audio, "bytes": None} if isinstance(audio, str) else audio
    source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else folder / stored["path"]
    try:
        samples, own = soundfile.read(source, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UsageError(f"cannot read the recording {stored['path']}: {error}") from error
    common = gcd(own, rate)
    mono = samples.mean(axis=1)
    return mono if own == rate else resample_poly(mono, rate // common, own // common).astype(np.float32)


def tokenizer_for(model_args: ModelArguments, texts: list[str] | None, folder: Path) -> Any:
    """Return the model's tokenizer or, if it has none, a tokenizer of the letters of the training set."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    letters = sorted(set("".join(texts or [])) - {" ", "|"})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **model_args.hub_kwargs)
    except (OSError, ValueError, TypeError) as error:  # versions raise different errors without a vocabulary
        if texts is None or model_args.tokenizer_name is not None:
            said = str(error).partition("\n")[0].rstrip(".")
            raise UsageError(f"{source} has no tokenizer ({said}): name one by --tokenizer_name.") from error
    else:
        known = tokenizer.get_vocab()
        strange = [letter for letter in letters if letter not in known]
        if len(strange) > len(letters) / 2:
            raise UsageError(
                f"{source} does not know most letters of the training set: {' '.join(strange)}. Change the words to "
                "its case by --text_case, or name another --tokenizer_name."
            )
        return tokenizer
    letters = ["|", *letters, "[UNK]", "[PAD]"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: n for n, letter in enumerate(letters)}), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(str(vocabulary), unk_token="[UNK]", pad_token="[PAD]", word_delimiter_token="|")


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and predict as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, SpeechArguments, LoRAProTrainingArguments),
        "run_speech_recognition.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    start(training, parser)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(recordings, data=data))
    source = model_args.model_name_or_path
    extractor = load_processor(AutoFeatureExtractor, source, model_args)
    with training.main_process_first(desc="making the vocabulary"):
        texts = list(splits["train"]["text"]) if "train" in splits else None
        tokenizer = tokenizer_for(model_args, texts, Path(training.output_dir))
    folder = Path(data.train_file or data.validation_file or data.test_file or ".").parent

    def features(row: dict[str, Any]) -> dict[str, Any]:
        sound = waveform(row["audio"], folder, extractor.sampling_rate)
        values = extractor(sound, sampling_rate=extractor.sampling_rate)["input_values"][0]
        return {"input_values": values, "labels": tokenizer(row["text"])["input_ids"], "length": len(values)}

    with training.main_process_first(desc="reading the recordings"):
        longest = data.max_duration_in_seconds * extractor.sampling_rate
        splits = splits.map(features, remove_columns=["audio", "text"], **data.map_kwargs)
        splits = splits.filter(lambda length: length <= longest, input_columns="length", **data.map_kwargs)
    for split, rows in splits.items():
        if not len(rows):
            raise UsageError(
                f"every recording of the {split} set is longer than --max_duration_in_seconds "
                f"{data.max_duration_in_seconds:g}; raise it."
            )
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "ctc_loss_reduction": "mean"}
    model = load_model(AutoModelForCTC, model_args, **sizes, ignore_mismatched_sizes=True)
    model.config.ctc_zero_infinity = True  # for recordings that are too short for their text
    model.config.layerdrop = 0.0  # DDP would wait for the gradient of a dropped layer
    # these models have no embeddings; only this kind of checkpointing needs no inputs with gradients
    training.gradient_checkpointing_kwargs = {"use_reentrant": False, **(training.gradient_checkpointing_kwargs or {})}
    model = add_adapter(model, adapter, None, head="lm_head")
    # PEFT would take a vocabulary of another size for resized embeddings and save them
    model.get_input_embeddings = model.get_output_embeddings = lambda: None

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = extractor.pad([{"input_values": row["input_values"]} for row in rows], return_tensors="pt")
        labels = [torch.tensor(row["labels"]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {**batch, "labels": padded}

    metric = load_metric("wer")

    def decoded(tokens: np.ndarray, **how: Any) -> list[str]:
        # the tokenizer would decode the padding -100 as an unknown letter
        return list(tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), **how))

    def word_errors(prediction: Any) -> dict[str, float]:
        # two equal letters of a text are no repetition of one sound
        said = decoded(prediction.label_ids, group_tokens=False)
        return metric(decoded(prediction.predictions), said)

    trainer = LoRAProTrainer(
        model,
        training,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=extractor,
        data_collator=collate,
        compute_metrics=word_errors,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )

    tokenizer.save_pretrained(training.output_dir)
    card = {"finetuned_from": source, "tasks": "automatic-speech-recognition", "dataset": data.described}
    run(trainer, parser, splits.get("test"), card, lines_of=lambda output: decoded(output.predictions))


if __name__ == "__main__":
    main()
