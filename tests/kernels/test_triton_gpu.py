"""The Triton kernels on a GPU: real shapes, every shipped configuration, a million tokens.

Needs pytest, torch and triton only:

    python3 -m pytest tests/kernels/test_triton_gpu.py tests/kernels/test_launches_gpu.py
"""

import math

import pytest
import test_block_sparse
import test_varlen
import torch
from attention_cases import (
    Case,
    _ls,
    assert_as_good_as_eager,
    make_inputs,
    reference_results,
    run_with_grads,
)
from move_cases import MOVE_CASES, check_moves

from s2_kernels import configs, dense, hopper, ranges, s2_attention, sliding_window
from s2_kernels.backward import launch_backward
from s2_kernels.forward import launch_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
]

HALVES = [torch.bfloat16, torch.float16]
BANDS = [(4, 1), (16, 4), (None, 8)]

EDGES = [(2, 1), (7, 3), (20, 6)]
REAL = [
    Case("plain", _ls(8, 8, 64, 8, 8), 3001, d=128),
    Case("gqa", _ls(16, 4, 64, 4, 8, head_step=2), 2048, d=128, b=2),
    Case("mqa", _ls(8, 1, 64, 4, 4), 1100, d=64),
    Case("per_head_strides", _ls(4, 4, 64, 4, [2, 8, 16, 3]), 2500, d=128),
    Case("dense_heads", _ls(8, 4, 64, 4, 8, dense_heads=1), 2222, d=128),
    Case("ranges", ranges(heads=8, block_size=64, bands=BANDS), 3000, d=128),
    Case("sliding_window", sliding_window(heads=4, block_size=64, local_blocks=5), 2000, d=128),
    Case("dense", dense(heads=4, kv_heads=2), 1999, d=128),
    Case("q_offset", _ls(4, 2, 64, 4, 4), 777, t=2500, d=128, q_offset=1723),
    Case("q_offset_aligned", _ls(4, 2, 64, 4, 4), 777, t=2500, d=128, q_offset=1728),
    Case("one_query", _ls(4, 2, 64, 4, 4), 1, t=2500, d=128, q_offset=2499),
    Case("q_longer_than_k", _ls(4, 4, 64, 4, 8), 2000, t=700, d=128),
    Case("k_longer_than_q", _ls(4, 4, 64, 4, 8), 700, t=2000, d=128),
    *(Case(f"block{n}", _ls(4, 4, n, 4, 4), 2051, d=128) for n in (16, 32, 128, 256)),
    *(Case(f"one_block_window{d}", _ls(4, 2, 64, 1, 3), 1500, d=d, b=2) for d in (128, 256)),
    *(
        Case(f"many_edges{d}", ranges(heads=4, kv_heads=2, block_size=64, bands=EDGES), 3011, d=d)
        for d in (128, 256)
    ),
    *(Case(f"head{d}", _ls(4, 2, 64, 4, 4), 1111, d=d) for d in (32, 48, 64, 80, 96, 192, 256)),
]


@pytest.fixture(autouse=True)
def poison():
    """What the allocator hands out next holds NaN. What a large test took, others can have."""
    torch.full((2**28,), math.nan, device="cuda")
    yield
    if torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()


def check(case, dtype, **options):
    inputs = make_inputs(case, dtype, "cuda")

    def attend(q, k, v):
        return s2_attention(
            q, k, v, case.pattern, q_offset=case.q_offset, return_lse=True, **options
        )

    truth, eager = reference_results(case, inputs)
    assert_as_good_as_eager(run_with_grads(attend, inputs), truth, eager, case)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_shapes(case, dtype):
    check(case, dtype, backend="triton")


def needs_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_hopper(case, dtype):
    """The Hopper kernels where they take the case, as good as eager; else they say why not."""
    needs_hopper()
    q, k, v, *_ = make_inputs(case, dtype, "cuda")
    if hopper.why_not(q, k, v, case.pattern, None, case.q_offset):
        small = case.pattern.block_size < 64 or case.d < 48
        past = case.q_offset + case.s > case.kv_len
        assert small or past or case.s < min(128, case.kv_len)
        with pytest.raises(ValueError, match="backend='hopper' does not take"):
            s2_attention(q, k, v, case.pattern, q_offset=case.q_offset, backend="hopper")
        return
    check(case, dtype, backend="hopper")


@pytest.mark.parametrize(
    "kv_heads, d, block", [(16, 128, 64), (4, 128, 64), (16, 64, 128), (16, 256, 64), (4, 256, 128)]
)
def test_hopper_with_many_items(kv_heads, d, block):
    """Programs that work on dozens of items, short lists among them; sampled rows and columns."""
    needs_hopper()
    pattern = _ls(16, kv_heads, block, 4, 16, head_step=16 // kv_heads)
    check_sampled(pattern, 16_000, d, torch.bfloat16, "cuda", backend="hopper")


@pytest.mark.parametrize("growth", [20, 600])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("d", [128, 256])
def test_hopper_with_rising_scores(dtype, growth, d):
    """Blocks of keys of very different size: a list's maximum is moved again and again.

    Up to 600 times as large: exponents of hundreds, of which float32 has no power.
    """
    needs_hopper()
    case = Case("rising", _ls(4, 4, 64, 4, 4), 1990, d=d)
    inputs = make_inputs(case, dtype, "cuda")
    draw = torch.rand(32, generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        inputs[0].mul_(growth**0.5)
        inputs[1].mul_((growth**-draw).repeat_interleave(64)[: case.s].view(1, -1, 1, 1))

    def attend(q, k, v):
        return s2_attention(q, k, v, case.pattern, return_lse=True, backend="hopper")

    truth, eager = reference_results(case, inputs)
    assert_as_good_as_eager(run_with_grads(attend, inputs), truth, eager, case)


@pytest.mark.parametrize("case", REAL[::4], ids=str)
def test_float32(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*REAL[:3], *REAL[-7:]], ids=str)
def test_adding_up_dq(case, dtype):
    check(case, dtype, backend="triton", deterministic=False)


def shipped():
    """Every configuration of the tables: (table, kind of kernel, head size, configuration)."""
    tables = {n: x for n, x in vars(configs).items() if isinstance(x, dict) and "forward" in x}
    assert tables
    return [
        pytest.param(name, kind, d, config, id=f"{name.strip('_')}-{kind}-D{d}-{config}")
        for name, table in tables.items()
        for kind, rows in table.items()
        for d, config in rows
    ]


@pytest.mark.parametrize("table, kind, d, config", shipped())
def test_every_shipped_configuration(table, kind, d, config):
    """On this GPU, whichever they are meant for."""
    dtypes = [torch.float32] if "FLOAT32" in table else HALVES
    for dtype in dtypes:
        case = Case(kind, _ls(4, 2, 64, 4, 4), 1500, d=d)
        inputs = make_inputs(case, dtype, "cuda")
        truth, eager = reference_results(case, inputs)
        q, k, v, dout, dlse = (x.detach() for x in inputs)
        common = (case.pattern, 1 / math.sqrt(d))
        out, lse = launch_forward(q, k, v, *common, config=config if kind == "forward" else None)
        tiles = {
            "separate": dict(dkdv_config=config),
            "fused": dict(dkdv_config=config),
            "dq": dict(dq_config=config),
        }
        dq, dk, dv = launch_backward(
            *(q, k, v, out, lse, dout, dlse.float()),
            *common,
            **tiles.get(kind, {}),
            deterministic=kind != "fused",
        )
        results = dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)
        assert_as_good_as_eager(results, truth, eager, case)


LENGTHS = [517, 1, 0, 2048, 63, 1300, 128, 64, 2]


@pytest.mark.parametrize("deterministic", [True, False], ids=["separate", "fused"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packed(dtype, deterministic):
    options = dict(backend="triton", deterministic=deterministic)
    test_varlen.check(_ls(8, 2, 64, 4, 4), LENGTHS, LENGTHS, dtype, d=128, **options)


PACKED = {
    "gqa": _ls(8, 2, 64, 4, 4),
    "mha": _ls(4, 4, 64, 4, 5),
    "block128": _ls(4, 4, 128, 2, 3),
    "block256": _ls(2, 2, 256, 2, 3),
    "ranges": ranges(heads=4, kv_heads=2, block_size=64, bands=EDGES),
    "dense_heads": _ls(4, 2, 64, 2, 4, dense_heads=1),
    "one_block": _ls(2, 2, 64, 1, 2),
}


@pytest.mark.parametrize("d", [128, 64, 96])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pattern", PACKED.values(), ids=PACKED)
def test_packed_on_hopper(pattern, dtype, d):
    needs_hopper()
    test_varlen.check(pattern, LENGTHS, LENGTHS, dtype, d=d, backend="hopper")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_any_block_mask(dtype):
    case = Case("any", _ls(4, 2, 64, 4, 4), 2000, d=128, b=2)
    test_block_sparse.check(case, test_block_sparse.any_mask(4, 32, 32), dtype)


def one_row(q, k, v, dout, pattern, head, row, dtype):
    """out, lse and dq of one query row, computed in `dtype`."""
    group, block = pattern.heads // pattern.kv_heads, pattern.block_size
    blocks = torch.arange(row // block + 1)
    kept = blocks[row // block - blocks < pattern.rules[head // group].lifetimes(len(blocks))]
    cols = (kept[:, None] * block + torch.arange(block)).flatten()
    cols = cols[cols <= row].to(q.device)
    q_i, dout_i = (x[0, row, head].to(dtype) for x in (q, dout))
    k_j, v_j = (x[0, cols, head // group].to(dtype) for x in (k, v))
    scale = 1 / math.sqrt(len(q_i))
    scores = (k_j @ q_i) * scale
    lse = torch.logsumexp(scores, 0)
    probs = (scores - lse).exp()
    out = probs @ v_j
    dscores = probs * (v_j @ dout_i - (dout_i * out).sum())
    return dict(out=out, lse=lse, dq=dscores @ k_j * scale)


def one_column(q, k, v, dout, out, lse, pattern, kv_head, col, dtype):
    """dk and dv of one KV token in `dtype`, given out and lse of the rows that see it."""
    group, block = pattern.heads // pattern.kv_heads, pattern.block_size
    life = pattern.lifetime(kv_head, col // block)
    rows = slice(col, min((col // block + life) * block, q.shape[1]))
    dk = dv = 0
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_i, dout_i, out_i = (x[0, rows, head].to(dtype) for x in (q, dout, out))
        k_j, v_j = (x[0, col, kv_head].to(dtype) for x in (k, v))
        scale = 1 / math.sqrt(len(k_j))
        probs = (q_i @ k_j * scale - lse[0, head, rows].to(dtype)).exp()
        dscores = probs * (dout_i @ v_j - (dout_i * out_i).sum(-1))
        dk, dv = dk + dscores @ q_i * scale, dv + probs @ dout_i
    return dict(dk=dk, dv=dv)


def stacked(results):
    """[{name: x}, ...] -> {name: [x, ...]}."""
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def check_sampled(pattern, n, d, dtype, device, backend):
    """One forward and backward pass; sampled rows and columns against float64."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (pattern.heads, pattern.kv_heads, pattern.kv_heads, pattern.heads)
    q, k, v, dout = (
        torch.randn(1, n, h, d, device=device, dtype=dtype, generator=generator) for h in heads
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = s2_attention(*leaves, pattern, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))

    draw = torch.Generator().manual_seed(1)
    rows = [0, n - 1, *torch.randint(n, (22,), generator=draw).tolist()]
    rows = [(i % pattern.heads, row) for i, row in enumerate(rows)]
    got = [dict(out=out[0, r, h], lse=lse[0, h, r], dq=dq[0, r, h]) for h, r in rows]
    truth, eager = (
        stacked([one_row(q, k, v, dout, pattern, h, r, x) for h, r in rows])
        for x in (torch.float64, dtype)
    )
    case = Case("rows", pattern, n)
    assert_as_good_as_eager(stacked(got), truth, eager, case)

    columns = [0, n - 1, *torch.randint(n, (10,), generator=draw).tolist()]
    # Every other one on the shard, where the whole rest of the sequence sees it.
    size, columns = pattern.block_size, [(i % pattern.kv_heads, c) for i, c in enumerate(columns)]
    for i in range(2, len(columns), 2):
        head, col = columns[i]
        block = col // size
        lives = pattern.rules[head].lifetimes(block + 1)
        columns[i] = (head, int(lives.flip(0).argmax().neg() + block) * size + col % size)
    got = [dict(dk=dk[0, c, h], dv=dv[0, c, h]) for h, c in columns]
    truth, eager = (
        stacked([one_column(q, k, v, dout, out, lse, pattern, h, c, x) for h, c in columns])
        for x in (torch.float64, dtype)
    )
    assert_as_good_as_eager(stacked(got), truth, eager, case)


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("kv_heads", [8, 2], ids=["mha", "gqa"])
def test_a_million_tokens(kv_heads, backend):
    torch.cuda.empty_cache()
    check_sampled(_ls(8, kv_heads, 64, 16, 8), 2**20, 128, torch.bfloat16, "cuda", backend)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("case", MOVE_CASES, ids=str)
def test_blocks_that_are_moved_and_added_up(case, dtype):
    """By the launcher, and by plans: thrice the bits of PyTorch on the CPU."""
    for _ in range(3):
        check_moves(case, dtype, "cuda")
