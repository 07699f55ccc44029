"""Checks that a process without a usable triton works; test_triton.py starts it."""

import copy

import torch

import fastbert
from fastbert import dispatch, ops
from fastbert.cli.environment import environment


def check(word: str) -> None:
    """Check that a training step is bitwise stock's, and that every place that gives the reason includes `word`."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 31}
    model = BertForMaskedLM(BertConfig(**sizes)).train()
    patched = fastbert.patch(copy.deepcopy(model), mlm_logits="none")
    ids = torch.randint(31, (2, 5))
    losses = []
    for trained, optimizer in ((model, torch.optim.AdamW), (patched, fastbert.AdamW)):
        steps = optimizer(trained.parameters())
        torch.manual_seed(1)
        for _ in range(2):
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]
    state = patched.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert ops.MISSING is not None and word in ops.MISSING
    assert word in dispatch.device_reason(torch.device("cpu"), torch.float32)
    assert word in environment()["kernels"]
    rows = [row for row in fastbert.report(patched).rows if row.kernel]
    assert rows and all(word in row.reason and not row.kernel_calls for row in rows), rows
    print("checked")
