"""Shapes, patterns and the one tolerance rule that every backend is tested with."""

from dataclasses import dataclass

import torch

from s2_kernels import LayerPattern, dense, local_stride, ranges, sliding_window
from s2_kernels.reference import masked_attention, token_mask


@dataclass(frozen=True)
class Case:
    """One attention problem. `s` query tokens at `q_offset`, `t` KV tokens (default: as many)."""

    name: str
    pattern: LayerPattern
    s: int
    t: int | None = None
    d: int = 32
    b: int = 1
    q_offset: int = 0

    @property
    def kv_len(self) -> int:
        return self.t or self.s

    def __str__(self) -> str:
        p = self.pattern
        return (
            f"{self.name}-B{self.b}-S{self.s}-T{self.kv_len}-H{p.heads}-KV{p.kv_heads}"
            f"-D{self.d}-block{p.block_size}-q{self.q_offset}"
        )


def _ls(heads, kv_heads, block, local, stride, **more):
    return local_stride(
        heads=heads,
        kv_heads=kv_heads,
        block_size=block,
        local_blocks=local,
        stride=stride,
        **more,
    )


THREE_RANGES = [(2, 1), (5, 2), (None, 4)]

CASES = [
    Case("plain", _ls(4, 4, 16, 2, 4), 256),
    Case("odd_length", _ls(2, 2, 16, 2, 3), 215, b=2),
    Case("gqa", _ls(6, 2, 16, 2, 4, head_step=2), 137),
    Case("mqa", _ls(4, 1, 32, 1, 3), 161),
    Case("block64", _ls(2, 2, 64, 2, 4), 448, d=64),
    Case("one_block", _ls(2, 2, 64, 2, 4), 50),
    Case("one_token", _ls(2, 2, 16, 2, 4), 1),
    Case("local_over_sequence", _ls(2, 2, 16, 40, 4), 150),
    Case("stride_over_blocks", _ls(2, 2, 16, 2, 64), 150),
    Case("per_head_strides", _ls(4, 4, 16, 2, [2, 4, 8, 3]), 211),
    Case("dense_heads", _ls(4, 2, 16, 2, 4, dense_heads=1), 170),
    Case("homogeneous", _ls(2, 2, 16, 1, 4, head_offset=1, homogeneous=True), 130),
    Case("ranges", ranges(heads=4, kv_heads=2, block_size=16, bands=THREE_RANGES), 241),
    Case("short_ranges", ranges(heads=2, block_size=16, bands=[(2, 1), (6, 2)]), 241),
    Case("sliding_window", sliding_window(heads=2, block_size=16, local_blocks=3), 200),
    Case("dense", dense(heads=2, block_size=64), 190),
    Case("q_offset", _ls(2, 2, 16, 2, 4), 64, t=192, q_offset=128),
    Case("q_offset_unaligned", _ls(4, 2, 16, 2, 4), 37, t=150, q_offset=101),
    Case("one_query", _ls(2, 2, 16, 2, 4), 1, t=150, q_offset=149),
    Case("q_longer_than_k", _ls(2, 2, 16, 2, 8), 200, t=70),
]


def make_inputs(case: Case, dtype, device="cpu", seed=0):
    """q, k, v (leaves) and the gradients of out and lse, drawn in float64 and rounded."""
    g = torch.Generator().manual_seed(seed)
    p = case.pattern

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    q = draw(case.b, case.s, p.heads, case.d).requires_grad_()
    k = draw(case.b, case.kv_len, p.kv_heads, case.d).requires_grad_()
    v = draw(case.b, case.kv_len, p.kv_heads, case.d).requires_grad_()
    return q, k, v, draw(*q.shape), draw(case.b, p.heads, case.s)


def run_with_grads(attend, inputs, lse_gradient=True):
    """out, lse, dq, dk, dv of `attend(q, k, v) -> (out, lse)`."""
    q, k, v, dout, dlse = inputs
    out, lse = attend(q, k, v)
    finite = lse.isfinite()
    outputs = [out, lse.masked_fill(~finite, 0)] if lse_gradient else [out]
    seeds = [dout.to(out.dtype), dlse.to(lse.dtype) * finite][: len(outputs)]
    grads = torch.autograd.grad(outputs, (q, k, v), seeds)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def double(inputs):
    """The same (already rounded) inputs in float64: what the reference computes from."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def reference_results(case: Case, inputs, lse_gradient=True):
    """The float64 truth, and plain eager at the inputs' own precision: the yardstick."""
    mask = token_mask(case.pattern, case.s, case.kv_len, case.q_offset, inputs[0].device)
    truth = run_with_grads(lambda *x: masked_attention(*x, mask), double(inputs), lse_gradient)
    eager = run_with_grads(lambda *x: masked_attention(*x, mask), inputs, lse_gradient)
    return truth, eager


def assert_as_good_as_eager(results, truth, eager, case):
    """The one tolerance rule: error <= 2x the error of plain eager at the same precision.

    The error is the root mean square over the finite entries, with a floor of half a unit of
    rounding. A single token is special: eager is exact by luck where dp and delta cancel in dq and
    dk, so there the floor is the rounding of those two (about 1, times the scale, for unit inputs).
    """
    for name, true in truth.items():
        got, plain = results[name].double(), eager[name].double()
        assert torch.equal(got.isneginf(), true.isneginf()), f"{name}: -inf in other places"
        assert not got.isnan().any(), f"{name}: NaN"
        finite = true.isfinite()
        rms = true[finite].pow(2).mean().sqrt()

        def error(x, finite=finite, true=true):
            return (x - true)[finite].pow(2).mean().sqrt()

        floor = torch.finfo(results[name].dtype).eps / 2 * rms
        if case.kv_len == 1:
            floor = 2 * floor / rms
        allowed = 2 * torch.maximum(error(plain), floor)
        assert error(got) <= allowed, (
            f"{name}: rms error {error(got):.3e}, eager {error(plain):.3e}, allowed {allowed:.3e}"
        )
