"""The demo: a small language model learns arithmetic word problems, once with LoRA and once with LoRA-Pro."""
