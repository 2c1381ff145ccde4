"""The command `lorapro evaluate`: lm-eval's tasks and ours, on a base model or an adapter."""
