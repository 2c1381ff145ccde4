"""`lorapro init`: a recipe for a model and a data file."""
