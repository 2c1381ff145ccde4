"""How is a step computed? Pure functions of batched tensors, without a model or an optimizer."""
