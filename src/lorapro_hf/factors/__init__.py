"""Where are the LoRA factors of a model, and how are many of one shape read and written at once?"""
