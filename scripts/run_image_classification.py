r"""Fine-tune a vision model such as ViT or CLIP's image tower to classify images with LoRA-Pro.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name ethz/food101 --validation_split validation --do_train --do_eval \
        --learning_rate 5e-4 --output_dir runs/food

Your own images lie in a folder with a subfolder for each class: `--train_dir` and `--validation_dir`. The model's image
processor resizes and normalizes them; torchvision is not needed.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.hf_argparser import HfArg

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.options import UsageError, require_packages
from lorapro_hf.recipes.cells import complete_rows, require_columns
from lorapro_hf.recipes.data import DataArguments, keep_all_of, load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.files import read_images
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.metrics import labels_in, of_labels
from lorapro_hf.recipes.model import (
    AdapterArguments,
    ModelArguments,
    add_adapter,
    load_config,
    load_model,
    load_processor,
)
from lorapro_hf.recipes.parser import RecipeParser

with one_line_errors():
    require_packages("run_image_classification.py", "PIL", extra="scripts")
    from PIL import Image, ImageOps


@dataclass
class ImageArguments(DataArguments):
    """The data set of images."""

    train_dir: str | None = HfArg(default=None, help="Folder with a folder of images for each class.")
    validation_dir: str | None = HfArg(default=None, help="The same for the evaluation.")
    image_column_name: str = HfArg(default="image", help="Column with the images.")
    label_column_name: str = HfArg(default="label", help="Column with the classes.")
    random_crop: bool = HfArg(default=False, help="Train on random parts of the images.")
    random_flip: bool = HfArg(default=False, help="Mirror every second image of the training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._folders() and (self.dataset_name is not None or self._files()):
            raise UsageError("--train_dir and --validation_dir exclude --dataset_name and --train_file.")

    def available(self, cache_dir: str | None) -> dict[str, Dataset]:
        """Return the splits, from folders too."""
        for split, folder in self._folders().items():
            if not Path(folder).is_dir():
                raise UsageError(f"--{split}_dir {folder}: there is no such folder.")
        if not self._folders():
            return super().available(cache_dir)
        return {split: read_images(folder, f"--{split}_dir", cache_dir) for split, folder in self._folders().items()}

    def _folders(self) -> dict[str, str]:
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        return {split: folder for split, folder in folders.items() if folder is not None}


def labelled(rows: Dataset, split: str, data: ImageArguments) -> Dataset:
    """Return the columns `image` and `label`, the latter with names of classes, without blank rows."""
    names = {data.image_column_name: "image", data.label_column_name: "label"}
    require_columns(rows, names, " Name them by --image_column_name and --label_column_name.")
    rows = complete_rows(rows.select_columns([*names]), names, f"the {split} set", keep_all=keep_all_of(split))
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    return rows if isinstance(rows.features["label"], ClassLabel) else rows.class_encode_column("label")


def part_of(image: Image.Image) -> Image.Image:
    """Return a random part with 8 to 100 % of the area and a ratio of the sides changed by at most a third."""
    width, height = image.size
    for _ in range(10):
        side = (width * height * random.uniform(0.08, 1.0)) ** 0.5
        stretch = random.uniform(0.75, 4 / 3) ** 0.5
        w, h = round(side * stretch), round(side / stretch)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((left, top, left + w, top + h))
    return image


def reader(processor: Any, crop: bool = False, flip: bool = False) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """Return a function from images to pixels, which runs whenever rows are read."""

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        if crop:
            images = [part_of(image) for image in images]
        if flip:
            images = [ImageOps.mirror(image) if random.random() < 0.5 else image for image in images]
        return {"pixel_values": list(processor(images, return_tensors="pt")["pixel_values"]), "labels": batch["label"]}

    return read


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch of images of one size."""
    labels = torch.tensor([row["labels"] for row in rows])
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and predict as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, ImageArguments, LoRAProTrainingArguments),
        "run_image_classification.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    start(training, parser)
    training.remove_unused_columns = False  # the transform needs the images
    splits = load_splits(data, training, model_args.cache_dir, also=("train",), prepare=partial(labelled, data=data))
    labels = splits["train"].features["label"].names
    for split, rows in splits.items():
        if rows.features["label"].names != labels:
            raise UsageError(f"the classes of the {split} set are not those of the training set: {labels}.")
    numbers = {name: number for number, name in enumerate(labels)}
    names = {"num_labels": len(labels), "label2id": numbers, "id2label": {n: name for name, n in numbers.items()}}
    source = model_args.model_name_or_path
    config = load_config(model_args, **names)
    processor = load_processor(AutoImageProcessor, model_args.tokenizer_name or source, model_args)
    # replaces a head of other classes
    model = load_model(AutoModelForImageClassification, model_args, config=config, ignore_mismatched_sizes=True)
    model = add_adapter(model, adapter, None, training.gradient_checkpointing, head="classifier")

    for split, rows in splits.items():
        learns = split == "train"
        rows.set_transform(reader(processor, data.random_crop and learns, data.random_flip and learns))
    trainer = LoRAProTrainer(
        model,
        training,
        train_dataset=splits["train"] if training.do_train else None,
        eval_dataset=splits.get("validation"),
        processing_class=processor,
        data_collator=collate,
        compute_metrics=of_labels("accuracy"),
    )

    def lines_of(output: Any) -> list[str]:
        numbers = enumerate(labels_in(output.predictions))
        return ["index\tprediction", *(f"{n}\t{labels[number]}" for n, number in numbers)]

    dataset = data.described or (Path(data.train_dir).name if data.train_dir else None)
    card = {"finetuned_from": source, "tasks": "image-classification", "dataset": dataset}
    run(trainer, parser, splits.get("test"), card, lines_of=lines_of)


if __name__ == "__main__":
    main()
