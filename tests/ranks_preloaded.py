"""What the ranks of tests/ranks.py import, which takes ten seconds, so that their fork server does it once."""

import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import fastbert.patch
import fastbert.registry
import fastbert.testing.interpreter
import fastbert.testing.models  # noqa: F401
