"""Realistic training on a GPU: a whole step in a CUDA graph, GradScaler's infinities, a thousand steps in bfloat16."""

import copy
import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
from torch.amp import GradScaler

import fastbert
from fastbert.testing.models import assert_bitwise, counting
from fastbert.testing.rows import DEVICE
from tests.gpu import captured, peak_bytes
from tests.models.tiny import BASE, CLASSIFICATION, MLM, config, make, make_batch
from tests.packaging.environments import ROOT

VOCABULARY = 128
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "max_position_embeddings": 64}
SIZES = {"rows": 32, "length": 64}


def wide(seed=0, **overrides):
    """A model with transformers' initial weights, so that it learns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MLM.cls(config(vocab_size=VOCABULARY, **WIDE | overrides))
    model.set_attn_implementation("sdpa")
    return model.to(DEVICE).train()


class Text:
    """Sequences with one topic each, out of 31 topics with four words, so that there is something to learn.

    15 % of the tokens are masked (3 stands for [MASK]) and labelled; every second row ends in padding.
    """

    def __init__(self):
        self.shape = (SIZES["rows"], SIZES["length"])

    def batch(self, seed):
        generator = torch.Generator().manual_seed(seed)
        topics = torch.randint((VOCABULARY - 4) // 4, self.shape[:1], generator=generator)
        ids = 4 + 4 * topics[:, None] + torch.randint(4, self.shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, self.shape[1] // 2 :] = 0
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & mask.bool()
        chosen[:, 1] = True
        read, labels = ids.masked_fill(chosen, 3) * mask, ids.masked_fill(~chosen, -100)
        batch = {"input_ids": read, "attention_mask": mask, "labels": labels}
        return {name: x.to(DEVICE) for name, x in batch.items()}


def trained(model, batches, steps, autocast=torch.bfloat16, lr=1e-3):
    """The loss of each step."""
    optimizer = fastbert.AdamW(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        with torch.autocast(DEVICE.type, autocast):
            loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


def final(losses):
    """The mean of the last tenth."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def parity(stock, patched, first):
    """Why the final losses (one per seed) do not come from equivalent training, or None.

    Dropout draws different bits, so runs differ like two seeds. The means over the seeds may differ by three times the
    standard error of their difference, and all runs must learn: their loss must be a nat below the `first` loss.
    """
    error = math.sqrt((statistics.variance(stock) + statistics.variance(patched)) / len(stock))
    difference = abs(statistics.fmean(stock) - statistics.fmean(patched))
    if not all(loss < first - 1 for loss in stock + patched):
        return f"a run did not learn: {stock} and {patched} from {first}"
    return None if difference <= 3 * error else f"{difference} between the means, {error} is the standard error"


@pytest.mark.parametrize(
    ("patched", "reason"),
    [
        ([1.0, 1.2, 1.1], None),
        ([1.2, 1.3, 1.1], None),
        ([1.6, 1.7, 1.8], "between the means"),
        ([1.0, 1.1, 5.5], "did not learn"),
        ([1.0, 1.1, math.nan], "did not learn"),
    ],
)
def test_what_parity_notices(patched, reason):
    found = parity([1.0, 1.1, 1.2], patched, 6.0)
    assert found is None if reason is None else reason in found


def finals_of(seeds, steps, autocast=torch.bfloat16, **overrides):
    """The final losses of stock and patched, one per seed, with the same weights, batches and optimizer."""
    batches = [Text().batch(seed) for seed in range(50)]
    finals = {"stock": [], "patched": []}
    for seed in seeds:
        model = wide(seed, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **overrides)
        for name, lane in (("stock", copy.deepcopy(model)), ("patched", fastbert.patch(model))):
            torch.manual_seed(seed)
            with counting() as launched:
                finals[name].append(final(trained(lane, batches, steps, autocast)))
            assert ("attention_fwd_kernel" in launched) is (name == "patched")
    return finals


@pytest.mark.gpu
def test_a_thousand_steps_in_bfloat16(record_property):
    """Four seeds, dropout 0.1, autocast: a minute or two."""
    finals = finals_of(range(4), 1000)
    record_property("final losses", finals)
    assert parity(finals["stock"], finals["patched"], math.log(VOCABULARY)) is None


class Training:
    """A step of MLM training, entirely on the device, as a CUDA graph requires."""

    def __init__(self, packed, p, lr=1e-3, autocast=torch.bfloat16, **overrides):
        model = wide(hidden_dropout_prob=p, attention_probs_dropout_prob=p, **overrides)
        self.autocast, self.batch = autocast, Text().batch(0)
        self.model = fastbert.patch(model, **({"unpad": True, "mlm_logits": "none"} if packed else {"mlm_logits": "full"}))
        self.budgets = {"token_budget": self.batch["labels"].numel(), "read_budget": self.batch["labels"].numel() // 2}
        self.packed = packed
        self.lr = torch.tensor(lr, device=DEVICE)
        self.optimizer = fastbert.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0, capturable=DEVICE.type == "cuda")

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, self.autocast, cache_enabled=False):
            loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forward(self):
        if not self.packed:
            # Counting the labelled rows would synchronise, which a graph cannot: the loss uses all logits.
            logits = self.model(**{name: x for name, x in self.batch.items() if name != "labels"}).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.batch["labels"].flatten())
        with fastbert.lengths(self.model, **self.budgets):
            return self.model(**self.batch).loss

    def parameters(self):
        return {name: x.detach().clone() for name, x in self.model.named_parameters()}


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_steps_run_anywhere(packed, monkeypatch):
    """The step that is captured on a GPU, without the graph: it learns, on the kernels."""
    monkeypatch.setitem(globals(), "SIZES", {"rows": 2, "length": 9})
    training = Training(packed, 0.0, autocast=torch.float16, **SMALL)
    with counting(heads=True) as launched:
        losses = [training.step().item() for _ in range(2)]
    assert losses[1] < losses[0]
    assert launched["attention_fwd_kernel"] == 2 and bool(launched["gather_rows_kernel"]) is packed


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_whole_step_in_a_cuda_graph(packed):
    """Forward, loss, backward and optimizer, replayed on other batches, equal the same steps without a graph."""
    ours, eager = Training(packed, 0.0), Training(packed, 0.0)
    replay, loss = captured(ours.step)
    for _ in range(3):
        eager.step()  # as `captured` does before it captures
    eps, before = torch.finfo(torch.bfloat16).eps, ours.parameters()
    for seed in range(1, 6):
        for training in (ours, eager):
            for name, x in Text().batch(seed).items():
                training.batch[name].copy_(x)
            training.lr.mul_(0.9)
        replay()
        torch.testing.assert_close(loss, eager.step(), rtol=eps, atol=eps)
    still = [name for name, x in ours.parameters().items() if torch.equal(x, before[name])]
    assert still == [name for name, x in eager.parameters().items() if torch.equal(x, before[name])] and len(still) < 3, still


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_each_replay_of_a_whole_step_drops_anew(packed):
    """With a learning rate of 0 only dropout changes the loss, and the seed repeats it."""
    training = Training(packed, 0.2, lr=0.0)
    replay, loss = captured(training.step)
    before, losses = training.parameters(), []
    for seed in (None, None, None, 3, 3):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        replay()
        losses.append(loss.item())
    assert len(set(losses)) == 4 and losses[3] == losses[4]
    assert_bitwise(training.parameters(), before)


INFINITE = (1, 4)


def scaled_steps(model, steps, autocast):
    """The scale after each step, and whether the step changed parameters; in the steps named the loss is infinite."""
    optimizer = fastbert.AdamW(model.parameters(), lr=1e-3)
    scaler = GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)
    found = []
    for step in range(steps):
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        with torch.autocast(DEVICE.type, autocast):
            loss = model(**Text().batch(step)).loss
        scaler.scale(loss * (math.inf if step in INFINITE else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
        found.append((scaler.get_scale(), bool(changed)))
    assert all(x.isfinite().all() for x in model.parameters())
    return found


def check_scaler(autocast, steps=7, **overrides):
    """Check that steps with an infinity change nothing and halve the scale, as with a stock model, and others are taken."""
    model = wide(**overrides)
    with counting() as launched:
        patched = scaled_steps(fastbert.patch(copy.deepcopy(model)), steps, autocast)
    assert launched["attention_fwd_kernel"] == steps * model.config.num_hidden_layers
    assert patched == scaled_steps(model, steps, autocast)
    assert [changed for _, changed in patched] == [step not in INFINITE for step in range(steps)]


def test_the_scaler_s_steps_run_anywhere(monkeypatch):
    monkeypatch.setitem(globals(), "SIZES", {"rows": 2, "length": 5})
    monkeypatch.setitem(globals(), "INFINITE", (1,))
    check_scaler(torch.float16, 3, **SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_grad_scaler_with_forced_infinities(autocast):
    check_scaler(autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [BASE, MLM, CLASSIFICATION], ids=str)
def test_no_more_memory_than_stock(kind):
    """Peak memory of forward and backward with dropout, against SDPA, with warm caches."""
    overrides = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 512}
    model = make(kind, torch.bfloat16, "sdpa", hidden_dropout_prob=0.1, **overrides | {"num_hidden_layers": 4}).train()
    batch = make_batch(kind, length=512)

    def peak(lane):
        def step():
            lane.zero_grad(set_to_none=True)
            outputs = lane(**batch)
            (outputs[0].float().mean() if kind is BASE else outputs.loss).backward()

        return peak_bytes(step)

    stock = peak(copy.deepcopy(model))
    ours = peak(fastbert.patch(model))
    assert ours <= stock, f"{ours / 2**20:.1f} MiB against stock's {stock / 2**20:.1f}"


FIRST_STEP = """
import time
start = time.perf_counter()
import torch
from tests.models.test_gpu_training import Training
imported = time.perf_counter()
Training(False, 0.1).step()
torch.cuda.synchronize()
print(imported - start, time.perf_counter() - imported)
"""


@pytest.mark.gpu
def test_cold_start(tmp_path, record_property):
    """Seconds to the first training step in a new process, with an empty and with a full cache."""
    seconds = {}
    for cache in ("cold", "warm"):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", FIRST_STEP], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        _, seconds[cache] = map(float, done.stdout.split())
        record_property(f"{cache} start", seconds[cache])
        print(f"{cache} start: {seconds[cache]:.1f} s to the first step")
    assert any(tmp_path.iterdir()), "nothing was compiled"
    assert seconds["warm"] < seconds["cold"] < 120
