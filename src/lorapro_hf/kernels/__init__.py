"""The update of moments of the size of the weight and the small eigenproblems, one module for each backend."""
