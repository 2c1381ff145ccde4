"""Answers prompts with a saved adapter, with nothing but transformers and PEFT: lorapro_hf is not needed for that."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Read the arguments and, from stdin, a JSON list of prompts; print the list of answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="hub name or folder of the base model")
    parser.add_argument("--adapter", required=True, help="folder of the adapter and the tokenizer")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    inputs = tokenizer(json.load(sys.stdin), return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if any(name.partition(".")[0] == "lorapro_hf" for name in sys.modules):
        sys.exit("lorapro_hf has been imported, though the adapter must load without it")
    print(json.dumps([answer.strip() for answer in answers]))


if __name__ == "__main__":
    main()
