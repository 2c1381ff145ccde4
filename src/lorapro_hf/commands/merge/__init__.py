"""The command `lorapro merge`: one model of a base model and an adapter."""
