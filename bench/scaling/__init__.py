"""What many GPUs would cost: bytes that each rank sends per step, counted from the model's parameters, and a small simulator of
one training step. Nothing here is measured on more than one GPU; every assumption is a field of `Assumptions`."""
