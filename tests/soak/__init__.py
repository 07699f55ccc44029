"""Trains a tiny model for thousands of steps while everything fails that may fail: python -m tests.soak."""
