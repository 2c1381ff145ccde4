"""Make the inputs of the recipes in configs/smoke: tiny random models and a few rows of data, without a network.

    python scripts/make_smoke_inputs.py build/smoke
    lorapro train configs/smoke/smollm2-135m.yaml

The recipes look for them in the folder `build/smoke` of the current directory.
"""

from __future__ import annotations

import argparse
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lorapro_hf import gelora_ranks

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}U:{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**WIDTHS, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
PICTURE = {**WIDTHS, "image_size": 16, "patch_size": 8}
SQUARE = {"height": 16, "width": 16}
SCALED = {"size": SQUARE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
COLORS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}
REWARD = """\
def letters(completions, **_):
    \"\"\"Differ between almost any two answers.\"\"\"
    return [sum(map(ord, str(answer))) / 1000 for answer in completions]
"""
QUESTIONS, ANSWERS = [f"What is {n} + 1?" for n in range(24)], [f"The answer is {n + 1}." for n in range(24)]


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with a chat template that marks the assistant's turns."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(special + alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=256, **tokens)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return the same tokenizer, which ends each text with </s> as T5's does."""
    fast = byte_tokenizer()
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", fast.eos_token_id)]
    )
    return fast


def text_models() -> dict[str, tuple[Any, Any]]:
    """Return language models by name, each with its tokenizer."""
    words = byte_tokenizer()
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(words)}
    llama = transformers.LlamaConfig(**DECODER, **tokens)
    qwen3 = transformers.Qwen3Config(**DECODER, **tokens)
    gemma3 = transformers.Gemma3Config(
        text_config={**DECODER, **tokens, "sliding_window": 64},
        vision_config=PICTURE,
        mm_tokens_per_image=4,
        image_token_index=3,
    )
    t5 = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0, **tokens
    )
    return {
        "llama": (transformers.LlamaForCausalLM(llama), words),
        "qwen3": (transformers.Qwen3ForCausalLM(qwen3), words),
        "gemma3": (transformers.Gemma3ForConditionalGeneration(gemma3), words),
        "t5": (transformers.T5ForConditionalGeneration(t5), t5_tokenizer()),
    }


def picture_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return the same tokenizer with a token for pictures, and a template for messages with pictures."""
    fast = byte_tokenizer()
    fast.add_tokens("<image>", special_tokens=True)
    parts = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    parts = f"{{% for part in message['content'] %}}{parts}{{% endfor %}}"
    fast.chat_template = CHAT_TEMPLATE.replace("{{ message['content'] }}", parts)
    return fast


class PixelSettings:
    """The saved settings of an image processor, which needs torchvision in some versions of transformers."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.settings = {"image_processor_type": kind, **settings}

    def save_pretrained(self, folder: Path) -> None:
        """Write the settings for `AutoImageProcessor`."""
        (folder / "preprocessor_config.json").write_text(json.dumps(self.settings, indent=2), encoding="utf-8")


class LlavaParts:
    """The saved parts of a processor of pictures and texts."""

    def save_pretrained(self, folder: Path) -> None:
        """Write tokenizer, template and settings for `AutoProcessor`."""
        picture_tokenizer().save_pretrained(folder)
        PixelSettings("CLIPImageProcessor", crop_size=SQUARE, **SCALED).save_pretrained(folder)
        settings = {"processor_class": "LlavaProcessor", "patch_size": 8, "num_additional_image_tokens": 1}
        settings |= {"vision_feature_select_strategy": "default", "image_token": "<image>"}
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def perception_models() -> dict[str, tuple[Any, Any]]:
    """Return models of pictures and of speech by name, each with its processor."""
    text = {**WIDTHS, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    clip = transformers.CLIPConfig(text_config=text, vision_config=PICTURE, projection_dim=16)
    vit = transformers.ViTConfig(**PICTURE)
    speech = transformers.Wav2Vec2Config(
        **WIDTHS,
        conv_dim=(16, 16),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_length=2,
    )
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(picture_tokenizer())}
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**PICTURE),
        text_config=transformers.LlamaConfig(**DECODER, **tokens),
        image_token_index=3,
        image_seq_length=4,
    )
    return {
        "clip": (transformers.CLIPModel(clip), PixelSettings("CLIPImageProcessor", crop_size=SQUARE, **SCALED)),
        "llava": (transformers.LlavaForConditionalGeneration(llava), LlavaParts()),
        "vit": (transformers.ViTForImageClassification(vit), PixelSettings("ViTImageProcessor", **SCALED)),
        "wav2vec2": (transformers.Wav2Vec2Model(speech), transformers.Wav2Vec2FeatureExtractor()),
    }


def write_texts(folder: Path) -> None:
    """Write a file of rows for each task on texts."""
    together = list(zip(QUESTIONS, ANSWERS, strict=True))
    tables: dict[str, Callable[[int, str, str], dict[str, Any]]] = {
        "messages": lambda n, q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "metamathqa": lambda n, q, a: {"query": q, "response": a, "type": "GSM_Rephrased" if n % 6 else "MATH_FOBAR"},
        "codefeedback": lambda n, q, a: {"query": q, "answer": f"So:\n```python\nprint({n + 1})\n```\n{a}"},
        "wizardlm": lambda n, q, a: {"instruction": q, "output": a if n % 6 else "Sorry, I cannot."},
        "preferences": lambda n, q, a: {"prompt": q, "chosen": a, "rejected": f"{n - 1}?"},
        "judged": lambda n, q, a: {"prompt": q, "completion": a if n % 2 else f"{n - 1}?", "label": n % 2 == 1},
        "problems": lambda n, q, a: {"question": q, "answer": f"{a} #### {n + 1}"},
        "mnli": lambda n, q, a: {"premise": q, "hypothesis": a, "label": n % 3},
        "qnli": lambda n, q, a: {"question": q, "sentence": a, "label": n % 2},
        "mrpc": lambda n, q, a: {"sentence1": q, "sentence2": a, "label": n % 2},
        "sst2": lambda n, q, a: {"sentence": q, "label": n % 2},
        "cola": lambda n, q, a: {"sentence": a, "label": n % 2},
        "summaries": lambda n, q, a: {"document": f"{q} {a}", "summary": a},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in tables.items():
        lines = [json.dumps(row(n, question, answer)) for n, (question, answer) in enumerate(together)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = "\n".join(f"{question} {answer}" for question, answer in together)
    (folder / "text.txt").write_text(plain, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")


def write_pictures(folder: Path, count: int = 4) -> None:
    """Write noisy pictures of one color each, in a folder for each color, and a table of questions about them."""
    generator, rows = np.random.default_rng(0), []
    for color, values in COLORS.items():
        (folder / color).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.clip(np.asarray(values) + generator.normal(0, 20, (20, 24, 3)), 0, 255)
            path = folder / color / f"{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            turns = [{"role": "user", "content": "Which color?"}, {"role": "assistant", "content": color}]
            rows.append(json.dumps({"images": [str(path.relative_to(folder.parent))], "messages": turns}))
    (folder.parent / "pictures.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_speech(folder: Path, count: int = 6, rate: int = 8000) -> None:
    """Write tones of half a second in WAV files, and a table of their words."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        tone = np.sin(2 * np.pi * (200 + 100 * (number % 2)) * np.arange(rate // 2) / rate)
        path = folder / f"{number}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
            file.writeframes((tone * 16000).astype("<i2").tobytes())
        rows.append(json.dumps({"audio": path.name, "text": "high tone" if number % 2 else "low tone"}))
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_ranks(model: Any, file: Path) -> None:
    """Write ranks for the layers of a language model, as `lorapro ranks` does."""
    tokens = torch.randint(4, model.config.vocab_size, (64, 8))
    file.write_text(json.dumps(gelora_ranks(model, [{"input_ids": tokens}])), encoding="utf-8")


def main(folder: str) -> None:
    """Write all models and data below a folder."""
    root = Path(folder)
    transformers.set_seed(0)
    made = {**text_models(), **perception_models()}
    for name, (model, processor) in made.items():
        model.save_pretrained(root / "models" / name)
        processor.save_pretrained(root / "models" / name)
    write_texts(root / "data")
    write_ranks(made["llama"][0], root / "data" / "lora_config.json")
    write_pictures(root / "data" / "images")
    write_speech(root / "data" / "speech")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder for the models and data, such as build/smoke")
    main(parser.parse_args().folder)
