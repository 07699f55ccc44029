"""All kernels of a layer, bound once for calls of one shape and shared by all layers of a model and all steps."""

from functools import cache, lru_cache, partial
from typing import Any

import torch

from .. import attention, bias_gelu, dropout_add_layernorm
from ..core import column_sums, failures
from ..core.bound import Bound, Workspace, by_address, streams
from ..core.failures import KernelFailed
from ..core.launch import Work, accumulator_torch
from ..feed_forward import products as feed_forward_products
from ..feed_forward.products import GRADIENT, PRODUCT
from .settings import Call, Settings

PLANS = 256  # the number of plans kept, least recently used dropped first; a plan takes a few KiB


class Plan:
    """Bound kernels, and the size of the small arrays that a call allocates.

    Queries have `n_queries` rows, everything after attention has `n_rows`; widths are H, F and 3 H.
    """

    def __init__(self, call: Call, settings: Settings) -> None:
        self.call = call
        self.n_rows = n = call.rows if call.read_rows is None else call.read_rows
        self.n_queries = call.rows if call.longest_read is None else n
        low, hidden, inner = call.product_dtype, call.hidden, call.inner
        self.dtype, self.product_dtype, self.weight_dtype = call.dtype, low, call.weight_dtype
        self.hidden, self.gradient = hidden, call.gradient
        self.stream = streams(call.device)
        # A backward gains by concatenated projections: one product instead of three, and no sum of their gradients.
        self.one_by_one = not call.gradient and call.weight_dtype == low
        # Each LayerNorm's input, which is rounded to this dtype before its statistics are computed, and its output.
        self.z1_dtype = torch.promote_types(low, call.dtype)
        self.y1_dtype = call.norm_dtype or self.z1_dtype
        self.z2_dtype = torch.promote_types(low, self.y1_dtype)
        self.out_dtype = call.norm_dtype or self.z2_dtype
        # Without dropout and with one dtype, x and the residual have the same gradient.
        self.shares1 = settings.attention_output_p == 0.0 and low == call.dtype
        self.shares2 = settings.output_p == 0.0 and low == self.y1_dtype
        self.drops = settings.drops
        self._settings = settings
        self._like = partial(_like, device=call.device)
        self._wide = accumulator_torch(low)

        head_size = hidden // settings.heads
        planes = 2 if low.itemsize > 2 else 1
        self.softmax = (planes, settings.heads, self.n_queries), self._wide
        self.geometry = self._geometry(head_size)
        vector = 16 // low.itemsize
        self.aligned = head_size % vector == 0 and head_size % 16 != 0
        self._bind_forward(n, hidden, inner)
        if call.gradient:
            self._bind_backward(n, hidden, inner)

    def _geometry(self, head_size: int) -> attention.Geometry:
        call, settings = self.call, self._settings
        hidden = call.hidden
        read = call.longest_read is not None
        longest_q = call.longest_read if read else call.longest

        def strides(row: int, longest: int) -> attention.Strides:
            return 0 if call.packed else longest * row, row, head_size, 1

        keys = strides(hidden * (1 if self.one_by_one else 2 if read else 3), call.longest)
        return attention.Geometry(
            sequences=call.sequences,
            max_seqlen_q=longest_q,
            max_seqlen_k=call.longest,
            n_rows=self.n_queries,
            n_heads=settings.heads,
            kv_heads=settings.heads,
            head_size=head_size,
            q=strides(hidden, longest_q) if read else keys,
            k=keys,
            v=keys,
            mask=None,
            causal=settings.causal and longest_q > 1,
            scale=head_size**-0.5 if settings.scale is None else settings.scale,
            p=settings.attention_p,
        )

    def _bind_forward(self, n: int, hidden: int, inner: int) -> None:
        call, settings = self.call, self._settings
        low, weight = call.product_dtype, call.weight_dtype
        like = self._like(dtype=low)
        self.attention = self._bind(
            attention.forward_work(self.geometry, like, self.aligned),
            *{"q_ptr": low, "k_ptr": low, "v_ptr": low, "out_ptr": low}.items(),
            ("logsumexp_ptr", self._wide if call.gradient else None),
            *self._masks(),
            ("seed_ptr", _seed(settings.attention_p)),
        )
        self.norm1 = self._bind_norm(
            call.dtype, self.z1_dtype, self.y1_dtype, settings.attention_eps, settings.attention_output_p
        )
        self.norm2 = self._bind_norm(self.y1_dtype, self.z2_dtype, self.out_dtype, settings.output_eps, settings.output_p)
        saved = ("h_ptr", low if call.gradient else None)
        self.product = self._bind_product(
            PRODUCT, ("x_ptr", low), ("weight_ptr", low), ("bias_ptr", weight), saved, ("y_ptr", low)
        )
        if self.product is None:
            work = bias_gelu.forward_work(n, inner, (inner, 1), like, settings.activation)
            self.gelu = self._bind(work, ("x_ptr", low), ("bias_ptr", weight), ("y_ptr", low))
        self.statistics1 = (n,), accumulator_torch(self.z1_dtype)
        self.statistics2 = (n,), accumulator_torch(self.z2_dtype)
        if call.gradient:  # what the backward needs of the forward, besides the large tensors
            z1, z2 = ((n, hidden), self.z1_dtype), ((n, hidden), self.z2_dtype)
            self.kept = Workspace(
                *(self.softmax, z1, self.statistics1, self.statistics1),
                *(z2, self.statistics2, self.statistics2),
            )

    def _bind_norm(self, residual: torch.dtype, z: torch.dtype, y: torch.dtype, eps: float, p: float) -> Bound:
        call, n, hidden = self.call, self.n_rows, self.call.hidden
        widest = self._like(dtype=max(y, z, key=lambda dtype: dtype.itemsize))
        statistic = accumulator_torch(z) if call.gradient else None
        return self._bind(
            dropout_add_layernorm.forward_work(n, hidden, (hidden, 1), (hidden, 1), widest, z, eps, p),
            ("x_ptr", call.product_dtype),
            ("residual_ptr", residual),
            *((name, call.weight_dtype) for name in ("weight_ptr", "bias_ptr", "x_bias_ptr")),
            ("seed_ptr", _seed(p)),
            ("y_ptr", y),
            ("y_low_ptr", None if y == call.product_dtype else call.product_dtype),
            ("z_ptr", z),
            ("mean_ptr", statistic),
            ("rstd_ptr", statistic),
        )

    def _bind_backward(self, n: int, hidden: int, inner: int) -> None:
        call, settings = self.call, self._settings
        low, weight = call.product_dtype, call.weight_dtype
        like, wide = self._like(dtype=low), self._wide
        projections = self._bind_attention_backward(low, hidden // settings.heads)

        residual1 = None if self.shares1 else call.dtype
        dropped = settings.attention_output_p, settings.output_p
        self.norm1_backward, sums1 = self._bind_norm_backward(self.y1_dtype, self.z1_dtype, residual1, low, dropped[0])
        residual2 = None if self.shares2 else self.y1_dtype
        self.norm2_backward, sums2 = self._bind_norm_backward(self.out_dtype, self.z2_dtype, residual2, None, dropped[1])
        tensors = {"bias_ptr": weight, "h_ptr": low, "dh_ptr": low, "y_ptr": low, "sums_ptr": wide}
        self.product_gradient = self._bind_product(GRADIENT, ("dout_ptr", low), ("weight_ptr", low), *tensors.items())
        if self.product_gradient is not None:
            gelu_rows = feed_forward_products.rows_of_sums(n, inner, like)
        else:
            work, gelu_rows = bias_gelu.backward_work(n, inner, (inner, 1), (inner, 1), like, settings.activation)
            self.gelu_backward = self._bind(
                work,
                *{"dy_ptr": low, "x_ptr": low, "bias_ptr": weight, "dx_ptr": low, "y_ptr": low, "sums_ptr": wide}.items(),
            )
        rows = sums2, gelu_rows, sums1, *projections
        widths = 3 * hidden, inner, 3 * hidden, *((hidden, 2 * hidden) if len(projections) == 2 else (3 * hidden,))
        self.sums = self._bind(
            column_sums.work(rows, widths, self._like(dtype=wide)),
            ("out_ptr", weight),
            *((f"{part}_ptr", wide) for part in "abcde"[: len(rows)]),
        )
        # The order of the vectors: the second LayerNorm's weight, bias and x_bias; the activation's bias; the first LayerNorm's
        # weight, bias and x_bias; the projections' biases.
        self.vectors = [hidden, hidden, hidden, inner, *[hidden] * 6]
        self.vectors_in_all = sum(self.vectors)
        self.n_sums = len(rows)
        self.scratch = Workspace(*((shape, wide) for shape in zip(rows, widths, strict=True)), *self._queries)

    def _bind_attention_backward(self, low: torch.dtype, head_size: int) -> tuple[int, ...]:
        """Bind attention's backward. Returns the rows of sums of dq, and of dk and dv together; of all three together for short
        sequences, whose backward is one kernel."""
        call, wide, heads = self.call, self._wide, self._settings.heads
        like, q_row, k_row = self._like(dtype=low), self.geometry.q[1], self.geometry.k[1]
        dout = 0 if call.packed else self.geometry.max_seqlen_q * call.hidden, call.hidden, head_size, 1
        read = tuple((name, low) for name in ("q_ptr", "k_ptr", "v_ptr", "dout_ptr"))
        masks = dict(self._masks())
        of_queries = {"logsumexp_ptr": wide, "seed_ptr": _seed(self._settings.attention_p), "dq_ptr": low}
        of_keys = {"dk_ptr": low, "dv_ptr": low}
        short = attention.backward_short_work(self.geometry, like, dout, q_row, k_row, self.aligned)
        self.attention_short, self._queries = None, ()
        if short is not None:
            masks.pop("mask_ptr")
            self.attention_short = self._bind(
                short, *read, *masks.items(), *of_queries.items(), *of_keys.items(), ("sums_ptr", wide)
            )
            return (call.sequences,)
        self._queries = (attention.query_scratch(self.geometry, low),)
        shared = *read, ("queries_ptr", self._queries[0][1]), *masks.items()
        q = attention.backward_q_work(self.geometry, like, dout, q_row, self.aligned)
        self.attention_q = self._bind(q, *shared, ("out_ptr", low), *of_queries.items(), ("sums_ptr", wide))
        kv = attention.backward_kv_work(self.geometry, like, dout, k_row, self.aligned)
        self.attention_kv = self._bind(kv, *shared, *of_keys.items(), ("sums_ptr", wide))
        return q.programs // heads, kv.programs // heads

    def _bind_product(self, part: str, *tensors: tuple[str, torch.dtype | None]) -> Bound | None:
        """A product of the feed-forward with an epilogue; None where cuBLAS and a kernel do its work."""
        call, like = self.call, self._like(dtype=self.call.product_dtype)
        sizes, activation = (self.n_rows, call.hidden, call.inner), self._settings.activation
        if not feed_forward_products.is_on(part, like, *sizes, activation):
            return None
        try:
            return self._bind(feed_forward_products.work(part, *sizes, like, activation), *tensors)
        except KernelFailed as failure:
            if failures.strict:
                raise
            failures.record(failure)
            return None

    def _bind_norm_backward(
        self, dy: torch.dtype, z: torch.dtype, dresidual: torch.dtype | None, y: torch.dtype | None, p: float
    ) -> tuple[Bound, int]:
        """The kernel and the number of rows of sums that it writes. With `y` it also writes the forward's result again."""
        call, n, hidden = self.call, self.n_rows, self.call.hidden
        widest = self._like(dtype=max(dy, z, key=lambda dtype: dtype.itemsize))
        work = dropout_add_layernorm.backward_work(n, hidden, (hidden, 1), widest, z, p)
        statistic = accumulator_torch(z)
        bound = self._bind(
            work,
            *{"dy_ptr": dy, "z_ptr": z, "mean_ptr": statistic, "rstd_ptr": statistic}.items(),
            ("weight_ptr", call.weight_dtype),
            ("bias_ptr", None if y is None else call.weight_dtype),
            ("seed_ptr", _seed(p)),
            ("dx_ptr", call.product_dtype),
            ("dresidual_ptr", dresidual),
            ("y_ptr", y),
            ("sums_ptr", statistic),
        )
        return bound, work.programs

    def _masks(self) -> tuple[tuple[str, torch.dtype | None], ...]:
        call = self.call
        mask = (torch.bool, torch.int32) if call.masked else (None, None)
        packed = torch.int32 if call.packed else None
        return (
            ("key_mask_ptr", mask[0]),
            ("key_bounds_ptr", mask[1]),
            ("mask_ptr", None),
            ("cu_seqlens_q_ptr", packed),
            ("cu_seqlens_k_ptr", packed),
        )

    def _bind(self, work: Work, *tensors: tuple[str, torch.dtype | None]) -> Bound:
        return Bound(work, self._like(dtype=self.call.product_dtype), dict(tensors))


@cache
def _like(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor, whose dtype and device select configurations."""
    return torch.empty(0, dtype=dtype, device=device)


def _seed(p: float) -> torch.dtype | None:
    return torch.int64 if p > 0.0 else None


@lru_cache(PLANS)
def _kept(call: tuple[Any, ...], settings: Settings) -> Plan:
    return Plan(Call._make(call), settings)


def plan_of(call: tuple[Any, ...], settings: Settings) -> Plan:
    """The plan for such calls; `call` holds a Call's fields.

    Raises:
        KernelFailed: one of its kernels cannot be compiled or loaded.
    """
    return _kept(call, settings) if by_address() else Plan(Call._make(call), settings)


def clear() -> None:
    """Drop all plans."""
    _kept.cache_clear()
