"""How does the optimizer step LoRA factor pairs, and what does it keep?"""
