"""What is the mathematics of a step: pure functions of batched tensors, without a model or an optimizer?"""
