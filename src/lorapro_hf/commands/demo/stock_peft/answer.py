"""Answers a prompt with a saved adapter, with nothing but transformers and PEFT: lorapro_hf is not needed for that."""

from __future__ import annotations

import argparse
import sys

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(base: str, gguf_file: str | None, adapter: str, prompt: str, max_new_tokens: int) -> str:
    """What the base model with the adapter writes after `prompt`; the tokenizer lies beside the adapter."""
    extra = {}
    if gguf_file is not None:
        extra["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **extra)
    model = PeftModel.from_pretrained(model, adapter).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def main() -> None:
    """Read the arguments, print the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="hub name or folder of the base model")
    parser.add_argument("--gguf_file", help="its GGUF file, if it is one")
    parser.add_argument("--adapter", required=True, help="folder of the adapter and the tokenizer")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    text = answer(**vars(parser.parse_args()))
    if any(name.partition(".")[0] == "lorapro_hf" for name in sys.modules):
        sys.exit("lorapro_hf has been imported, though the adapter must load without it")
    print(text)


if __name__ == "__main__":
    main()
