"""More elements than an int32 counts, in dense tensors on a GPU: the last ones are right too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter
from fastbert.kernels.attention import attention
from fastbert.kernels.core.plain_dropout import keep_scores
from fastbert.kernels.embedding_layernorm import embedding_layernorm
from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import decided
from fastbert.kernels.gather_rows import gather_rows
from fastbert.kernels.key_bounds import key_bounds
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.kernels.packed_rows import packed_rows
from fastbert.kernels.pool_rows import MODES, pool_rows
from fastbert.kernels.row_counts import row_counts
from fastbert.testing import encoder_layer as layer
from fastbert.testing import feed_forward as feed_forward_inputs
from fastbert.testing import linear_cross_entropy as cross_entropy
from fastbert.testing.numerics import assert_close
from fastbert.testing.row_op import RowOp
from fastbert.testing.rows import DEVICE, run
from fastbert.testing.specs import ROW_OPS, SPECS

PAST = 2**31
GROUPS = [Hyperparameters(lr=0.1)]  # a step large enough to show in bfloat16
ROWS = 40  # how many of the last rows are compared
Check = Callable[[int, torch.dtype], None]  # with tensors of so many elements


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def assert_last(whole: dict[str, Tensor | None], alone: dict[str, Tensor | None], names: tuple[str, ...]) -> None:
    """The last rows have the same bits as in a call of their own, and are not zeros."""
    for name in names:
        assert alone[name].any() and torch.equal(whole[name][-len(alone[name]) :], alone[name]), name


def check_rows(op: RowOp) -> Check:
    def check(elements: int, dtype: torch.dtype) -> None:
        width = 768
        n_rows = elements // width + ROWS
        inputs = {name: normal(n_rows, width, dtype=dtype) for name in op.rows}
        inputs |= {name: normal(width, dtype=dtype) for name in op.vectors}
        dy = normal(n_rows, width, dtype=dtype)
        whole = run(op.call, inputs, dy)
        last = {name: x[-ROWS:] if name in op.rows else x for name, x in inputs.items()}
        assert_last(whole, run(op.call, last, dy[-ROWS:]), ("y", *(f"d{name}" for name in op.rows)))

    return check


def check_feed_forward(elements: int, dtype: torch.dtype) -> None:
    """h with so many elements, against plain PyTorch on its last rows."""
    hidden, inner = 64, 128
    inputs = feed_forward_inputs.make_inputs(elements // inner + ROWS, hidden, inner, hidden, dtype)
    dy = normal(*inputs["x"].shape, dtype=dtype)
    with decided(True, True):
        whole = run(feed_forward, inputs, dy)
    found = {name: whole[name][-ROWS:] for name in ("y", "dx")}

    def last(cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        tensors = {name: cast(x[-ROWS:] if name == "x" else x) for name, x in inputs.items()}
        expected = run(reference.feed_forward, tensors, cast(dy[-ROWS:]))
        return {name: expected[name] for name in found}

    assert_close(found, last(lambda x: x), last(Tensor.double), relative_fp32=None)


def check_gather_rows(elements: int, dtype: torch.dtype) -> None:
    """Reading and writing past 2^31: all rows in reverse order."""
    width = 768
    n_rows = elements // width + ROWS
    x, dy = (normal(n_rows, width, dtype=dtype) for _ in range(2))
    index = torch.arange(n_rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    results = run(gather_rows, {"x": x}, dy, index=index, inverse=index)
    for name, source in (("y", x), ("dx", dy)):
        assert torch.equal(results[name][:ROWS], source[-ROWS:].flip(0)), name
        assert torch.equal(results[name][-ROWS:], source[:ROWS].flip(0)), name


def check_key_bounds(elements: int, dtype: torch.dtype) -> None:
    mask = torch.zeros(elements // 64 + ROWS, 64, dtype=torch.bool, device=DEVICE)
    mask[-ROWS:] = torch.rand(ROWS, 64, device=DEVICE) < 0.5
    assert torch.equal(key_bounds(mask)[-ROWS:], reference.key_bounds(mask[-ROWS:]))


def check_row_counts(elements: int, dtype: torch.dtype) -> None:
    masks = [torch.zeros(elements // 64 + ROWS, 64, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    for mask in masks:
        mask[-ROWS:] = torch.rand(ROWS, 64, device=DEVICE) < 0.5
    assert torch.equal(row_counts(*masks)[:, -ROWS:], reference.row_counts(*(mask[-ROWS:] for mask in masks)))


def check_packed_rows(elements: int, dtype: torch.dtype) -> None:
    """A batch's rows are counted in int32, so there are fewer; those of the mask are as far apart."""
    shape = (ROWS, min(elements // 64, 2000))
    mask = torch.rand(shape, device=DEVICE) < 0.5
    far = torch.empty(elements + shape[1], dtype=torch.bool, device=DEVICE)
    far = far.as_strided(shape, (elements // (ROWS - 1), 1)).copy_(mask)
    arguments = shape[1], int(mask.sum()), int(mask.sum(1).max())
    for one, other in zip(
        packed_rows(row_counts(far, None), far, None, *arguments),
        reference.packed_rows(row_counts(mask, None), mask, None, *arguments),
        strict=True,
    ):
        assert torch.equal(one, other)


def check_pool_rows(elements: int, dtype: torch.dtype) -> None:
    """Sequences of 64 rows, without an index; the last ones alone are the same."""
    length, width = 64, 768
    batch = elements // (length * width) + ROWS
    x, dy = normal(batch * length, width, dtype=dtype), normal(batch, width, dtype=dtype)
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=DEVICE)
    for mode in MODES:
        whole = run(pool_rows, {"x": x}, dy, cu_seqlens=bounds, mode=mode, n_sequences=batch, seqlen=length)
        last = {"cu_seqlens": bounds[: ROWS + 1], "mode": mode, "n_sequences": ROWS, "seqlen": length}
        alone = run(pool_rows, {"x": x[-ROWS * length :]}, dy[-ROWS:], **last)
        assert_last(whole, alone, ("y", "dx"))


def check_embedding_layernorm(elements: int, dtype: torch.dtype) -> None:
    """So many tokens and a table of so many words, whose last rows the last tokens read."""
    width, length = 768, 64
    n_rows = elements // (width * length) + 2
    inputs = {"words": normal(elements // width + 2 * length, width, dtype=dtype)}
    inputs |= {name: normal(n, width, dtype=dtype) for name, n in (("positions", length), ("types", 2))}
    inputs |= {name: normal(width, dtype=dtype) for name in ("weight", "bias")}
    ids = torch.randint(len(inputs["words"]) - length, (n_rows, length), device=DEVICE)
    ids[-1] = torch.arange(len(inputs["words"]) - length, len(inputs["words"]), device=DEVICE)
    dy = normal(n_rows, length, width, dtype=dtype)
    whole = run(embedding_layernorm, inputs, dy, ids=ids)
    alone = run(embedding_layernorm, inputs | {"words": inputs["words"][-length:]}, dy[-1:], ids=ids[-1:] - ids[-1, 0])
    assert_last(whole, alone, ("y", "dwords"))


def check_attention(elements: int, dtype: torch.dtype) -> None:
    length, heads, head_size = (512, 16, 64) if elements >= PAST else (6, 2, 8)
    shape = (elements // (length * heads * head_size) + 2, length, heads, head_size)
    inputs = {name: normal(*shape, dtype=dtype) for name in ("q", "k", "v")}
    dy = normal(*shape, dtype=dtype)
    whole = run(attention, inputs, dy)
    alone = run(attention, {name: x[-1:] for name, x in inputs.items()}, dy[-1:])
    assert_last(whole, alone, ("y", "dq", "dk", "dv"))


def check_encoder_layer(elements: int, dtype: torch.dtype) -> None:
    """Queries, keys and values with so many elements, against plain PyTorch on the last sequences."""
    length, hidden = 64, 64
    settings = Settings(2, attention_p=0.1)
    inputs = layer.make_inputs((elements // (3 * length * hidden) + 2, length, hidden), hidden, dtype)
    dy = normal(*inputs["x"].shape, dtype=dtype)
    kept = len(inputs["x"]) - 2  # dropout depends on a sequence's number, so the last two get the masks that they had
    keep = keep_scores(layer.seeds()[0], range(kept, kept + 2), 2, length, length, 0.1), None, None
    found = run(layer.flat(encoder_layer), inputs, dy, layer.NAMES, settings=settings, seed=layer.seeds())
    found = {name: None if x is None else x[-2:] for name, x in found.items()}

    def last(cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        tensors = {name: None if x is None else cast(x[-2:] if name == "x" else x) for name, x in inputs.items()}
        call = layer.flat(layer.reference.encoder_layer)
        return run(call, tensors, cast(dy[-2:]), layer.NAMES, settings=settings, keep=keep)

    layer.assert_right(found, last(lambda x: x), last(Tensor.double), rounded=dtype.itemsize == 2)


def check_linear_cross_entropy(elements: int, dtype: torch.dtype) -> None:
    """A chunk of so many logits, against plain PyTorch on its last rows."""
    n_rows, width = ROWS + 960, 64
    n_cols = elements // n_rows + 8
    inputs, labels = cross_entropy.make_inputs(n_rows, 1, width, dtype, ignored=0.0)
    inputs |= {"weight": normal(n_cols, width, dtype=dtype) / 8, "bias": normal(n_cols, dtype=dtype)}
    labels.random_(0, n_cols)
    results = cross_entropy.run(linear_cross_entropy, inputs, labels, reduction="sum")
    losses = linear_cross_entropy(**inputs, labels=labels, reduction="none")
    found = {"y": losses[-ROWS:], "dhidden": results["dhidden"][-ROWS:]}

    def last(cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        tensors = {name: cast(x) for name, x in inputs.items()} | {"hidden": cast(inputs["hidden"][-ROWS:])}
        expected = cross_entropy.run(reference.linear_cross_entropy, tensors, labels[-ROWS:], reduction="none")
        return {name: expected[name] for name in found}

    assert_close(found, last(lambda x: x), last(Tensor.double), relative_fp32=None)


def check_adamw(elements: int, dtype: torch.dtype) -> None:
    """Each tensor of the step is one number repeated, so that its first and last elements get the same result."""
    tensors = [torch.ones(elements + 5000, dtype=dtype, device=DEVICE) for _ in range(4)]
    expected = [Parameter(*[x[-1000:].clone() for x in tensors], torch.zeros((), device=DEVICE))]
    adamw([Parameter(*tensors, torch.zeros((), device=DEVICE))], GROUPS)
    adamw(expected, GROUPS)
    for changed, alone in ((0, expected[0].param), (2, expected[0].exp_avg), (3, expected[0].exp_avg_sq)):
        assert torch.equal(tensors[changed][-1000:], alone) and torch.equal(tensors[changed][:1000], alone)
    assert not (expected[0].param == 1).any()


CHECKS: dict[str, Check] = {
    **{spec.name: check_rows(spec) for spec in ROW_OPS},
    "feed_forward": check_feed_forward,
    "gather_rows": check_gather_rows,
    "key_bounds": check_key_bounds,
    "row_counts": check_row_counts,
    "packed_rows": check_packed_rows,
    "pool_rows": check_pool_rows,
    "embedding_layernorm": check_embedding_layernorm,
    "attention": check_attention,
    "encoder_layer": check_encoder_layer,
    "linear_cross_entropy": check_linear_cross_entropy,
    "adamw": check_adamw,
}


@pytest.mark.no_launch
def test_every_op_has_a_size():
    assert CHECKS.keys() == SPECS.keys()


@pytest.mark.parametrize("op", CHECKS)
def test_checks_run_anywhere(op):
    """Checks the checks themselves on small tensors, without a GPU."""
    CHECKS[op](200, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("op", CHECKS)
def test_more_elements_than_an_int32_counts(op):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 50 * 2**30:
        pytest.skip(f"needs 50 GiB of GPU memory, {free / 2**30:.0f} are free")
    CHECKS[op](PAST + 2**20, torch.bfloat16)
    torch.cuda.empty_cache()
