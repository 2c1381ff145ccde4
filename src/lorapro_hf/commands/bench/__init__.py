"""The benchmark: `lorapro bench` measures LoRA-Pro's optimizer steps beside those of other optimizers for LoRA."""
