"""CUDA graphs of a patched model: one per bucket of shapes for inference, and of a whole training step."""
