"""Answers a prompt with a saved adapter, with nothing but transformers and PEFT: lorapro_hf is not needed for that."""

from __future__ import annotations

import argparse
import sys

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Read the arguments, print the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="hub name or folder of the base model")
    parser.add_argument("--gguf_file", help="its GGUF file, if it is one")
    parser.add_argument("--adapter", required=True, help="folder of the adapter and the tokenizer")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    extra = {}
    if args.gguf_file is not None:
        extra["gguf_file"] = args.gguf_file
        if hasattr(transformers, "GgufConfig"):
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, **extra)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    mask, limit = inputs["attention_mask"], args.max_new_tokens
    output = model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=limit, do_sample=False, **ends)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    if any(name.partition(".")[0] == "lorapro_hf" for name in sys.modules):
        sys.exit("lorapro_hf has been imported, though the adapter must load without it")
    print(tokenizer.decode(new_tokens, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
