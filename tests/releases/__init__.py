"""Tests fastbert under other releases of transformers and triton: python -m tests.releases digests | run | audit | table."""
