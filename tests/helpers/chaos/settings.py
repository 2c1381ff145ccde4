"""The training that is disturbed, as the process that judges it knows it; that process imports no trainer."""

RANKS = {"one": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
STEPS, SAVED_EVERY = 8, 2
END = "end"  # the folder of the adapter after the training
