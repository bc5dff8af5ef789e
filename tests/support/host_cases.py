"""What test_plans.py asks about the host's way to a launch; as a program it prints JSON.

It runs without TRITON_INTERPRET, which is chosen when the kernels are imported, and on the stub
driver of host_path.py. host_profile.py prints where the time goes.
"""

import contextlib
import functools
import json
import sys
from collections import Counter

import torch
from host_path import StubGPU, renamed, stub_gpu
from triton import knobs

from s2_kernels import (
    backward_dkdv,
    local_stride,
    moves,
    plans,
    s2_attention,
    s2_attention_backward,
    s2_attention_varlen,
)
from s2_kernels.hopper import backward_dkdv as hopper_dkdv
from s2_kernels.hopper import backward_dkdv_wide, primitives
from s2_kernels.near import Near
from s2_kernels.paged import paged_attention, write_pages
from s2_kernels.prefill import paged_prefill

WIDE = dict(heads=4, local_blocks=4, stride=4)


def case(backend, *, n=640, d=128, kv_heads=None, dtype=torch.bfloat16, layout="bshd", packed=False,
         lse=False, odd=False, q_offset=0, near=None):  # fmt: skip
    """Inputs that differ in what a plan depends on, and the function that attends to them.

    With `near` there are no queries but the last of n positions, from q_offset on.
    """
    pattern = local_stride(**WIDE, kv_heads=kv_heads)
    heads = (pattern.heads, pattern.kv_heads, pattern.kv_heads)

    def inputs():
        if packed:
            found = [torch.randn(n, h, d, dtype=dtype) for h in heads]
        elif layout == "sbhd":
            found = [torch.randn(n, 2, h, d, dtype=dtype).transpose(0, 1) for h in heads]
        else:
            keys = n - (near.start - near.row) * pattern.block_size if near else n
            rows = (n - q_offset, keys, keys)
            found = [
                torch.randn(2, r, h, d + 8 * odd, dtype=dtype)[..., :d]
                for r, h in zip(rows, heads, strict=True)
            ]
        return [x.detach().requires_grad_() for x in found]

    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)

    def attend(q, k, v):
        options = dict(backend=backend, return_lse=True)
        if packed:
            options |= dict(cu_seqlens_q=cu_seqlens, max_seqlen_q=n)
            return s2_attention_varlen(q, k, v, pattern, **options)
        return s2_attention(q, k, v, pattern, q_offset=q_offset, near=near, **options)

    return inputs, attend, lse


CHUNK = dict(n=1280, q_offset=960, near=Near(start=9, row=4))
"""As a rank of context parallelism has it: a row of far blocks belongs to no head."""
CASES = {
    "hopper": dict(backend="hopper"),
    "hopper-gqa-sbhd": dict(backend="hopper", kv_heads=2, layout="sbhd"),
    "hopper-d64-dlse": dict(backend="hopper", d=64, lse=True),
    "hopper-d256": dict(backend="hopper", d=256),
    "hopper-packed": dict(backend="hopper", packed=True),
    "hopper-odd-length": dict(backend="hopper", n=609, dtype=torch.float16),
    "hopper-cut": dict(backend="hopper", n=8192),
    "hopper-d256-cut": dict(backend="hopper", n=8192, d=256),
    "offset": dict(backend="auto", n=1000, q_offset=333),
    "d256-offset": dict(backend="auto", d=256, n=1000, q_offset=333),
    "auto": dict(backend="auto"),
    "triton": dict(backend="triton"),
    "triton-gqa-sbhd": dict(backend="triton", kv_heads=2, layout="sbhd"),
    "triton-d256-dlse": dict(backend="triton", d=256, lse=True),
    "triton-cut": dict(backend="triton", n=8192),
    "triton-packed": dict(backend="triton", packed=True),
    "triton-float32": dict(backend="triton", dtype=torch.float32, d=64),
    "triton-odd-rows": dict(backend="triton", d=128, odd=True),
    "hopper-near": dict(backend="hopper", **CHUNK),
    "hopper-d256-near": dict(backend="hopper", d=256, **CHUNK),
    "triton-near": dict(backend="triton", kv_heads=2, **CHUNK),
}


def both_passes(gpu: StubGPU, tensors, attend, with_lse: bool) -> list:
    """Launches of a forward and a backward pass, with addresses as names."""
    gpu.clear()
    out, lse = attend(*tensors)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    given = (out, lse) if with_lse else (out,)
    grads = torch.autograd.grad(given, tensors, (dout, dlse)[: len(given)])
    named = dict(zip("qkv", tensors, strict=True)) | dict(out=out, lse=lse, dout=dout, dlse=dlse)
    named |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    layouts = [(x.shape, x.stride(), x.dtype) for x in (out, lse, *grads)]
    known = {x.data_ptr(): name for name, x in named.items()}
    return [renamed(gpu.launches, known), str(layouts)]


def compare(gpu: StubGPU, options: dict) -> dict:
    """What a case launches by plan, and what without."""
    inputs, attend, with_lse = case(**options)
    plans.ON = False
    direct = both_passes(gpu, inputs(), attend, with_lse)
    plans.ON = True
    for _ in range(2):
        both_passes(gpu, inputs(), attend, with_lse)  # the second makes the plan
    with counted_passes() as ran:
        by_plan = both_passes(gpu, inputs(), attend, with_lse)
    return dict(direct=direct, plan=by_plan, passes=ran["by plan"])


@contextlib.contextmanager
def counted_passes():
    """Yields a counter of passes that ran by plan within the context."""
    ran, run = Counter(), plans.Plan.run

    def counted(plan, *arguments):
        made = run(plan, *arguments)
        ran["by plan"] += made is not None
        return made

    plans.Plan.run = counted
    try:
        yield ran
    finally:
        plans.Plan.run = run


def both_ways(step) -> tuple[list, list, int]:
    """What a step launches without plans, and by plan, and how many passes ran by plan then."""
    plans.ON = False
    direct = step()
    plans.ON = True
    step(), step()  # the second makes the plans
    with counted_passes() as ran:
        by_plan = step()
    return direct, by_plan, ran["by plan"]


def work_of(function) -> dict:
    """Python functions that a call enters, by module and name, and how many calls of C it makes."""
    entered, in_c = Counter(), Counter()

    def note(frame, event, argument):
        if event == "call":
            code = frame.f_code
            entered[f"{code.co_filename.rsplit('site-packages/')[-1]}:{code.co_name}"] += 1
        elif event == "c_call":
            in_c[getattr(argument, "__name__", str(argument))] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return dict(entered=entered, in_c=in_c, total=entered.total() + in_c.total())


def steady(gpu: StubGPU, options: dict) -> dict:
    """What the host does for a call of shapes that came before, forward and backward."""
    inputs, attend, _ = case(**options)
    tensors = inputs()
    dout = torch.ones_like(attend(*tensors)[0])
    held = []

    def forward():
        held[:] = [attend(*tensors)[0]]

    def backward():
        torch.autograd.grad(held[0], tensors, dout)

    for _ in range(4):
        forward()
        backward()
    compiled, found = len(gpu.compiled), []
    for _ in range(5):
        gpu.clear()
        found.append(dict(forward=work_of(forward), backward=work_of(backward)))
    # The least of five: Python's own housekeeping may fall into any of them.
    passes = ("forward", "backward")
    least = {name: min((x[name] for x in found), key=lambda x: x["total"]) for name in passes}
    return least | dict(launches=len(gpu.launches), compiled=len(gpu.compiled) - compiled)


def same_after(gpu: StubGPU, tensors, attend) -> dict:
    """Whether a call launches what it launches without plans, and how many passes ran by plan."""
    plans.ON = False
    direct = both_passes(gpu, tensors, attend, False)
    plans.ON = True
    with counted_passes() as ran:
        again = both_passes(gpu, tensors, attend, False)
    return dict(same=direct == again, passes=ran["by plan"])


def changes(gpu: StubGPU) -> dict:
    """Calls that have the key of a plan, and something else than before."""
    inputs, attend, _ = case("triton", kv_heads=4, n=256)
    for _ in range(3):
        both_passes(gpu, inputs(), attend, False)
    found = dict(other_addresses=same_after(gpu, inputs(), attend))

    q, k, v = inputs()
    odd = q.new_empty(q.numel() + 1)[1:].view_as(q).detach().requires_grad_()
    found["unaligned"] = same_after(gpu, (odd, k, v), attend) | dict(bits=odd.data_ptr() % 16)
    gpu.driver.stream = 18
    found["stream"] = same_after(gpu, inputs(), attend)
    found["streams"] = sorted({x.stream for x in gpu.launches})
    gpu.driver.stream = 17

    x = inputs()[0]
    gpu.clear()
    attend(x, x, x)
    alike = {value for kind, value in gpu.launches[0].parameters if kind == "address"}
    found["one_tensor_thrice"] = sum(x.data_ptr().to_bytes(8, "little") == a for a in alike)

    told = []
    knobs.runtime.launch_enter_hook.add(told.append)
    found["hook"] = same_after(gpu, inputs(), attend) | dict(told=len(told))
    knobs.runtime.launch_enter_hook.remove(told.append)

    tensors = inputs()
    for _ in range(3):
        gpu.clear()
        attend(*tensors)[0].sum().backward()  # a gradient without memory of its own
    found["expanded"] = len(gpu.launches)
    return found


def descriptors(gpu: StubGPU) -> dict:
    """TMA descriptors of a plan's launches: on new addresses, on the same, on new ones again."""
    inputs, attend, _ = case("hopper", n=1024)
    found, kept, outputs = {}, [inputs(), inputs()], []
    with torch.no_grad():
        for tensors in kept:
            outputs.append(attend(*tensors))
        for name in ("first", "again", "other"):
            if name != "again":
                kept.append(inputs())
                outputs.append(torch.empty_like(kept[-1][0]))
            gpu.clear()
            with placed(outputs[-1]):
                attend(*kept[-1])
            found[name] = gpu.maps
    return found


def zeroed(gpu: StubGPU) -> dict:
    """Tokens of dk and of dv that are 0 after a backward pass in which no kernel runs, by plan and
    without. What nobody wrote is NaN."""
    found = {}
    torch.use_deterministic_algorithms(True)  # it fills new memory
    for backend in ("hopper", "triton"):
        inputs, attend, _ = case(backend, **CHUNK)
        tensors = inputs()
        for name, by_plan in (("direct", False), ("first", True), ("second", True), ("plan", True)):
            plans.ON = by_plan
            out, _ = attend(*tensors)
            grads = torch.autograd.grad(out, tensors, torch.zeros_like(out))
            zeros = [(x == 0).all(-1).all(-1).all(0) for x in grads[1:]]
            assert all(x.isnan().any() for x in grads)
            found[f"{backend} {name}"] = [(x.sum().item(), x[0].item()) for x in zeros]
    torch.use_deterministic_algorithms(False)
    return found


def in_place(gpu: StubGPU) -> dict:
    """Both passes of a chunk into parts of larger tensors, by plan and without."""
    found, pattern = {}, local_stride(**WIDE)
    at = dict(q_offset=CHUNK["q_offset"], near=CHUNK["near"])
    for name, d in (("hopper", 128), ("hopper-d256", 256), ("triton", 128)):
        backend = name.split("-")[0]
        q, k, v = (x.detach() for x in case(backend, d=d, **CHUNK)[0]())
        dout = torch.randn_like(q)

        def step(tensors=(q, k, v), dout=dout, backend=backend) -> list:
            gpu.clear()
            shapes = [(2, len(x[0]) + 64, 8, x.shape[-1]) for x in (tensors[0], *tensors)]
            out, *into = (tensors[0].new_empty(shape)[:, 64:, 2:6] for shape in shapes)
            options = dict(backend=backend, **at)
            _, lse = s2_attention(*tensors, pattern, return_lse=True, into=out, **options)
            rest = (out, lse, dout, pattern)
            s2_attention_backward(*tensors, *rest, into=tuple(into), **options)
            named = dict(zip(("q", "k", "v", "dq", "dk", "dv"), (*tensors, *into), strict=True))
            named |= dict(out=out, lse=lse, dout=dout)
            return renamed(gpu.launches, {x.data_ptr(): name for name, x in named.items()})

        direct, by_plan, passes = both_ways(step)
        said = {str(x[0] if isinstance(x, tuple) else x) for run in by_plan for x in run}
        written = sorted(said & {"out", "dq", "dk", "dv"})
        found[name] = dict(same=direct == by_plan, passes=passes, written=written)
    return found


def moved(gpu: StubGPU) -> dict:
    """Rows copied to blocks of tokens, added to them, and cleared; by plan and without."""
    slots, heads, starts = (torch.arange(n) for n in (3, 3, 4))

    def step() -> list:
        gpu.clear()
        x, rows = torch.zeros(1, 256, 3, 128).bfloat16(), torch.zeros(3, 1, 64, 256).bfloat16()
        to = moves.of_tokens(x, 64, slots, heads)
        source = moves.of_rows(rows[..., 128:], slots)
        moves.clear_blocks(to)
        moves.copy_blocks(to, source)
        moves.add_blocks(source, to)
        moves.add_blocks(to, source, starts)
        known = dict(x=x, rows=rows[..., 128:], slots=slots, heads=heads, starts=starts)
        return renamed(gpu.launches, {x.data_ptr(): name for name, x in known.items()})

    direct, by_plan, passes = both_ways(step)
    return dict(same=direct == by_plan, passes=passes, launches=by_plan)


@contextlib.contextmanager
def placed(output: torch.Tensor):
    """Within the context outputs of this shape lie where `output` lies."""
    empty = torch.empty_strided

    def allocate(shape, strides, **options):
        here = tuple(shape) == tuple(output.shape)
        return output.detach() if here else empty(shape, strides, **options)

    torch.empty_strided = allocate
    try:
        yield
    finally:
        torch.empty_strided = empty


def paged(gpu: StubGPU) -> dict:
    """A step of decoding and one of writing, by plan and without; and of a prompt in parts."""
    pattern = local_stride(**WIDE, kv_heads=2)
    pages = [torch.zeros(9, pattern.block_size, 128).bfloat16() for _ in "kv"]
    table = torch.zeros(2, 2, 16, dtype=torch.int32)
    lengths = torch.full((2,), 700, dtype=torch.int32)
    k, v = (torch.randn(2, 1, 2, 128).bfloat16() for _ in "kv")

    def step(tokens: int) -> list:
        gpu.clear()
        q = torch.randn(2, tokens, 4, 128).bfloat16()
        write_pages(k, v, *pages, table, lengths, pattern)
        out = paged_attention(q, *pages, table, lengths, pattern)
        known = dict(q=q, out=out, k=k, v=v, pages_k=pages[0], pages_v=pages[1], table=table)
        return renamed(gpu.launches, {x.data_ptr(): name for name, x in known.items()})

    found = {}
    for name, tokens in (("token", 1), ("prompt", 300)):
        direct, by_plan, passes = both_ways(functools.partial(step, tokens))
        kernels = [x[0] for x in by_plan]
        found[name] = dict(same=direct == by_plan, passes=passes, kernels=kernels)

    cache = torch.zeros(99, 2, pattern.block_size, 128).bfloat16()  # as vLLM has pages
    table = torch.randperm(99)[:32].int().view(1, 2, 16)

    def chunk() -> list:
        gpu.clear()
        q, out = (torch.zeros(400, 4, 128).bfloat16()[None, 50:350] for _ in "qo")
        paged_prefill(q, *cache.unbind(1), table, pattern, lengths=(900,), into=out)
        return renamed(gpu.launches, {q.data_ptr(): "q", out.data_ptr(): "out"})

    direct, by_plan, passes = both_ways(chunk)
    found["chunk"] = dict(passes=passes, kernels=[[x[0] for x in run] for run in (direct, by_plan)])
    found["chunk"]["written"] = "out" in str(by_plan) and "'q'" in str(by_plan)
    return found


def report() -> dict:
    torch.set_num_threads(1)
    for module in (backward_dkdv, hopper_dkdv, backward_dkdv_wide, primitives):
        module.concurrent_programs = lambda device, num_warps: 132  # an H100's
    with stub_gpu() as gpu:
        found = dict(cases={name: compare(gpu, options) for name, options in CASES.items()})
        found["steady"] = {name: steady(gpu, dict(backend=name)) for name in ("hopper", "triton")}
        found["changes"] = changes(gpu)
        found["descriptors"] = descriptors(gpu)
        found["paged"] = paged(gpu)
        found["zeroed"] = zeroed(gpu)
        found["in_place"] = in_place(gpu)
        found["moved"] = moved(gpu)
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
