"""Where fastbert hooks into transformers by name rather than by class."""
