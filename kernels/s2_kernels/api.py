"""`s2_attention` and `s2_attention_varlen`: check the inputs and choose a backend."""

import itertools
import math
import os

import torch

from s2_kernels.autograd import refuse_other_modes
from s2_kernels.blocked import blocked_attention, blocked_backward
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.reference import reference_attention
from s2_kernels.versions import NO_TRITON

if NO_TRITON is None:
    from s2_kernels import ops
    from s2_kernels.launch import capability

BACKENDS = ("auto", "hopper", "triton", "blocked", "reference")
ON_GPU = ("auto", "hopper", "triton")
TRITON_HEAD_SIZES = range(32, 257, 16)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def s2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    *,
    softmax_scale: float | None = None,
    q_offset: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool = True,
    near: Near | None = None,
    spare: int = 0,
    into: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in which every KV head keeps the blocks that `pattern` gives it.

    Args:
        q: [b, s, h, d], any strides (Megatron's [s, b, h, d] goes in as `q.transpose(0, 1)`).
        k: [b, t, g, d]; v: [b, t, g, dv]; h a multiple of g, and query head i reads KV head
            i // (h / g). Nothing is repeated in memory.
        pattern: lifetimes for exactly these h and g heads (`LayerPattern.shard` under TP).
        softmax_scale: above 0; default 1 / sqrt(d).
        q_offset: position of the first query token in the KV sequence (tokens).
        return_lse: also return lse [b, h, s]: the natural log of the softmax denominator,
            float32 (float64 for float64 inputs), differentiable.
        backend: "auto" takes "blocked" for tensors that are not on a GPU; else "hopper" where it
            can, saying once where it cannot, and "triton". "triton": head sizes 32 to 256 in
            multiples of 16, bfloat16, float16 and float32, a contiguous last dimension, compute
            capability 8.0. "hopper": the kernels for compute capability 9.0 (head sizes 48 to 256,
            blocks from 64 on, 16-bit types; no query past the last key, or with a dense pattern
            all past a multiple of 64 keys; at least 128 queries where there are more keys).
            "blocked": PyTorch, any device. "reference": dense mask, for tests.
        deterministic: the Triton backward pass gives the same bits every time; else it adds dq up
            in an order that varies. The other backends, which always do, do not read it.
        near: k and v hold, of the blocks before near.start, only those that a head keeps forever
            (`near.Near`); q_offset and the pattern count from the start of the sequence all the
            same. All keys must be finite.
        spare: multiprocessors that the persistent Hopper kernels leave to others, such as NCCL; the
            other backends do not read it.
        into: out's place in a tensor of the caller's, like q but with dv columns, which are
            contiguous; outside of autograd only.

    Returns:
        out [b, s, h, dv] in q's dtype, or (out, lse); Triton lays out in memory like q. A query
        that sees no key (q_offset + s beyond t) has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; names the argument and the value.
        RuntimeError: forward-mode AD, torch.func, or, but for "blocked", a second derivative:
            only "reference" has them all.
    """
    scale = check_scale(softmax_scale, q)
    plan = None
    if backend in ON_GPU and q.is_cuda and not torch.compiler.is_compiling():
        # What ran before was checked before: the same shapes, strides, types and devices.
        problem = _problem(pattern, scale, q_offset, deterministic, backend, near, spare)
        plan = ops.known_plan(q, k, v, problem, into)
    if plan is None:
        _check(q, k, v, pattern, q_offset, dims=4, near=near)
        if into is not None:
            check_place(into, (*q.shape[:-1], v.shape[-1]), q)
        backend = _choose(backend, q, k, v)
    if into is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("into takes no part in autograd: leave it out, or call under no_grad()")
    if backend != "reference":
        refuse_other_modes("s2_attention", q, k, v)
    if backend in ON_GPU:
        problem = _problem(pattern, scale, q_offset, deterministic, backend, near, spare)
        if into is None:
            out, lse = ops.attend(q, k, v, None, None, problem, plan)
        else:
            out, lse = into, ops.attend_into(q, k, v, into, problem)
    else:
        run = reference_attention if backend == "reference" else blocked_attention
        out, lse = run(q, k, v, pattern, softmax_scale=scale, q_offset=q_offset, near=near)
        out = out if into is None else into.copy_(out)
    return (out, lse) if return_lse else out


def _problem(pattern, scale, q_offset, deterministic, backend, near, spare):
    """What the operators compute, of a dense batch."""
    place = (q_offset, deterministic, backend, *(near or (0, 0)), spare)
    return ops.Problem(pattern.key, scale, 0, 0, *place)


def s2_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    pattern: LayerPattern,
    *,
    softmax_scale: float | None = None,
    q_offset: int = 0,
    backend: str = "auto",
    deterministic: bool = True,
    near: Near | None = None,
    spare: int = 0,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of an `s2_attention` whose out and lse are at hand.

    For who runs the two passes apart (activation recompute that keeps the output). Takes no part in
    autograd itself.

    Args:
        out: [b, s, h, dv], lse: [b, h, s] as `s2_attention` returned them for the other arguments.
        dout: the gradient of out. The lse is taken to have none.
        backend: as in `s2_attention`, but for "reference".
        into: the places of dq, dk and dv, as in `s2_attention`; there what `near` gives to no head
            is undefined.

    Returns:
        dq, dk and dv, shaped like q, k and v.

    Raises:
        ValueError: as `s2_attention`; out, lse or dout of another shape.
    """
    _check(q, k, v, pattern, q_offset, dims=4, near=near)
    b, s, h, _ = q.shape
    shapes = {"out": (*q.shape[:-1], v.shape[-1]), "lse": (b, h, s)}
    shapes["dout"] = shapes["out"]
    for name, x in (("out", out), ("lse", lse), ("dout", dout)):
        if x.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {shapes[name]}")
    for x, place in zip((q, k, v), into or (), strict=bool(into)):
        check_place(place, x.shape, x)
    backend = _choose(backend, q, k, v)
    if backend != "reference":
        refuse_other_modes("s2_attention_backward", q, k, v, out, lse, dout)
    scale = check_scale(softmax_scale, q)
    if backend == "reference":
        raise ValueError("backend='reference' has no backward pass of its own; choose 'blocked'")
    with torch.no_grad():
        if backend == "blocked":
            made = blocked_backward(q, k, v, out, lse, dout, None, pattern, scale, q_offset, near)
            return tuple(x.copy_(y) for x, y in zip(into, made, strict=True)) if into else made
        problem = _problem(pattern, scale, q_offset, deterministic, backend, near, spare)
        if into:
            ops.gradients_into(q, k, v, out, lse, dout, into, problem)
            return into
        return ops.gradients(q, k, v, out, lse, dout, None, None, None, problem)


def s2_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`s2_attention` within each of many sequences packed one after the other (THD).

    Positions and blocks count from the start of each sequence, in q as in k: it gives what a call
    per sequence would. A sequence may be empty.

    Args:
        q: [T, h, d]. k: [T', g, d]. v: [T', g, dv]. Strides as in `s2_attention`.
        cu_seqlens_q: int32 or int64 [sequences + 1] on q's device: sequence i is the rows from
            cu_seqlens_q[i] to cu_seqlens_q[i + 1], from 0 to T. The values are not checked on a
            GPU, which would wait for it; rows outside every sequence are left undefined there.
        cu_seqlens_k: the same for k and v; default cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, or more (tokens);
            max_seqlen_k must be given with cu_seqlens_k.
        softmax_scale, return_lse, backend, deterministic: as in `s2_attention`. "hopper" and "auto"
            with it take head sizes to 128 and k packed like q; what follows a sequence in q, k, v
            and the gradient of out must be finite, since its last tile reads on.

    Returns:
        out [T, h, dv], or (out, lse) with lse [h, T].

    Raises:
        ValueError: as `s2_attention`; cu_seqlens or max_seqlen that do not fit.
    """
    _check(q, k, v, pattern, 0, dims=3)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    _check_packing(q, "q", cu_seqlens_q, max_seqlen_q)
    _check_packing(k, "k", cu_seqlens_k, max_seqlen_k)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_q has {len(cu_seqlens_q)} entries, cu_seqlens_k {len(cu_seqlens_k)}: "
            "must be as many"
        )
    backend = _choose(backend, q, k, v)
    if backend != "reference":
        refuse_other_modes("s2_attention_varlen", q, k, v)
    scale = check_scale(softmax_scale, q)
    if backend in ON_GPU:
        alike = cu_seqlens_k is cu_seqlens_q  # then the Hopper kernels take them
        cu_seqlens_q = cu_seqlens_q.int().contiguous()
        cu_seqlens_k = cu_seqlens_q if alike else cu_seqlens_k.int().contiguous()
        problem = ops.Problem(
            pattern=pattern.key,
            softmax_scale=scale,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            deterministic=deterministic,
            backend=backend,
        )
        out, lse = ops.attend(q, k, v, cu_seqlens_q, cu_seqlens_k, problem)
    else:
        run = reference_attention if backend == "reference" else blocked_attention
        out, lse = _each_sequence(run, q, k, v, pattern, scale, cu_seqlens_q, cu_seqlens_k)
    return (out, lse) if return_lse else out


def _each_sequence(run, q, k, v, pattern, scale, cu_seqlens_q, cu_seqlens_k):
    """out [T, h, dv] and lse [h, T] by one call of a dense backend per sequence."""
    outs, lses = [], []
    q_ends, k_ends = itertools.pairwise(cu_seqlens_q.tolist()), cu_seqlens_k.tolist()
    for (q_start, q_end), (k_start, k_end) in zip(q_ends, itertools.pairwise(k_ends), strict=True):
        if q_start == q_end:
            continue
        rows = q[None, q_start:q_end]
        if k_start == k_end:
            outs.append(rows[0, :, :, :1].expand(-1, -1, v.shape[-1]) * 0)
            lse_dtype = torch.promote_types(q.dtype, torch.float32)
            lses.append(q.new_full((q.shape[1], q_end - q_start), -math.inf, dtype=lse_dtype))
            continue
        keys, values = k[None, k_start:k_end], v[None, k_start:k_end]
        out, lse = run(rows, keys, values, pattern, softmax_scale=scale)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _check(q, k, v, pattern, q_offset, dims, near=None) -> None:
    """Shapes [*, heads, d] with a batch (dims 4) or packed (3), dtypes, devices and heads."""
    layout, of = ("[batch, seq, heads, d]", "b, ") if dims == 4 else ("[tokens, heads, d]", "")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {layout}")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: must be a floating-point type")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: must be the same"
            )
    batches_differ = dims == 4 and q.shape[0] != k.shape[0]
    if k.shape[:-1] != v.shape[:-1] or batches_differ or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be [{of}s, h, d], "
            f"[{of}t, g, d], [{of}t, g, dv]"
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q {tuple(q.shape)}, v {tuple(v.shape)}: must not be empty")
    if q.shape[-2] != pattern.heads or k.shape[-2] != pattern.kv_heads:
        raise ValueError(
            f"q has {q.shape[-2]} heads and k has {k.shape[-2]}, the pattern {pattern.heads} and "
            f"{pattern.kv_heads}: build it for these heads, or take pattern.shard(rank, world)"
        )
    if q_offset < 0:
        raise ValueError(f"q_offset={q_offset}: must be at least 0")
    if near is not None:
        near.check(pattern, k.shape[1], q_offset)


def check_place(into, shape, like) -> None:
    """Raises ValueError where results of such a shape cannot be written into a caller's tensor."""
    if into.shape != shape or into.dtype != like.dtype or into.device != like.device:
        raise ValueError(
            f"into has a tensor {tuple(into.shape)} of {into.dtype} on {into.device}: must be "
            f"{tuple(shape)} of {like.dtype} on {like.device}"
        )
    if into.stride(-1) != 1:
        raise ValueError(f"into has strides {into.stride()}: the last dimension must be contiguous")


def _check_packing(x, name, cu_seqlens, max_seqlen) -> None:
    what = f"cu_seqlens_{name}"
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != x.device:
        raise ValueError(
            f"{what} has shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}: must be "
            f"[sequences + 1] on {x.device}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} has dtype {cu_seqlens.dtype}: must be int32 or int64")
    if max_seqlen is None or max_seqlen < 1:
        raise ValueError(
            f"max_seqlen_{name}={max_seqlen}: must be the length of the longest sequence"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != len(x) or min(lengths) < 0:
            raise ValueError(f"{what}={ends}: must grow from 0 to {len(x)}, the rows of {name}")
        if max(lengths) > max_seqlen:
            raise ValueError(
                f"max_seqlen_{name}={max_seqlen}: the longest sequence has {max(lengths)} tokens"
            )


def check_scale(softmax_scale: float | None, q: torch.Tensor) -> float:
    """The scale to run with.

    Raises:
        ValueError: not a finite number above 0. The kernels look for the largest score before they
            scale it, so that a negative scale would overflow, and 0 times a masked score is NaN.
    """
    if softmax_scale is None:
        return 1 / math.sqrt(q.shape[-1])
    if not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"softmax_scale={softmax_scale}: must be a finite number above 0; for a negative one "
            "pass -q"
        )
    return float(softmax_scale)


def _choose(backend, q, k, v) -> str:
    """The backend to run; raises where Triton is meant and cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "auto" and not q.is_cuda:
        backend = "blocked"
    if backend in ON_GPU:
        check_triton(q, k, v)
    return backend


def check_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    way_out: str = "backend='blocked' (PyTorch, any device) takes it",
) -> None:
    """Raises ValueError, with the argument, its value and the way out, where Triton cannot run."""
    if NO_TRITON:
        raise ValueError(f"{NO_TRITON}; {way_out}")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"q is on {q.device}: the Triton kernels need a GPU (or TRITON_INTERPRET=1, to debug); "
            f"{way_out}"
        )
    if q.is_cuda and not torch.compiler.is_compiling():  # torch.compile cannot trace the question
        major, minor = capability(q.device)
        if (major, minor) < (8, 0):
            raise ValueError(
                f"q is on {torch.cuda.get_device_name(q.device)}, compute capability "
                f"{major}.{minor}: the Triton kernels need 8.0; {way_out}"
            )
    if q.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}: the Triton kernels take bfloat16, float16 and float32; "
            f"{way_out}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        size, allowed = x.shape[-1], TRITON_HEAD_SIZES
        # By comparisons: torch.compile cannot trace `in` with a dynamic size.
        if size % allowed.step or size < allowed.start or size >= allowed.stop:
            raise ValueError(
                f"{name} has head size {x.shape[-1]}: the Triton kernels take multiples of 16 "
                f"from 32 to 256; {way_out}"
            )
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}: the last dimension must be contiguous for the "
                f"Triton kernels; call {name}.contiguous(), or {way_out}"
            )
