"""The demo: how close LoRA-Pro's steps are to the full gradient, how it trains to the end, and a real model."""
