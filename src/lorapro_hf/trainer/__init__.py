"""How do transformers' `Trainer` and TRL's trainers train with LoRA-Pro?"""
