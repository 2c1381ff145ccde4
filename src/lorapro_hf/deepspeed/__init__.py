"""How do LoRA-Pro's steps and checkpoints work within DeepSpeed's engine?"""
