"""The comparison: every method for adapting a model, tuned alike, on the same data, over several seeds."""
