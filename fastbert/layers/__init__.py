"""Fast twins of transformers' BERT modules: subclasses that override `forward` and nothing else."""
