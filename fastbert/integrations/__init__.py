"""Integrations with transformers that work by name: the attention interface, Trainer's optimizer, a report callback."""
