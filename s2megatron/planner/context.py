"""What context parallelism costs one layer: bytes between its ranks, their time, buffers, copies.

With T bytes of K and V a token on one TP rank (2 * d * KV heads * width), N tokens and c ranks, the
busiest rank receives in a forward pass

    blocks by lifetimes   counted by s2_kernels.exchange (about T N (c - 1) / (c stride)): every S2
                          layer, and dense ones without Transformer Engine
    p2p, all_gather       T N (c - 1) / c
    a2a (Ulysses)         (2 d heads width + T) N (c - 1) / c^2, with the heads of one TP rank

and twice that in the backward pass (K and V again, dK and dV back), Ulysses once more.
"""

from s2_kernels.exchange import block_bytes
from s2megatron.context_split import Blocks, busiest, tp_shards
from s2megatron.machine import Machine
from s2megatron.planner.layout import GATHER, RING, Layout, Model
from s2megatron.planner.links import Transfer, all_to_all_seconds, gather_seconds, hop_seconds


def layer_blocks(model: Model, layout: Layout, layer: int) -> Blocks:
    """`busiest` of a layer's busiest TP rank."""
    pattern = model.patterns[layer]
    n_blocks = -(-model.shape.seq_len // pattern.block_size)
    shards = tp_shards(pattern, layout.tp)
    return max((busiest(s, n_blocks, layout.cp) for s in shards), key=lambda b: b.received)


def kv_token_bytes(model: Model, layout: Layout) -> float:
    """T: K and V of one token on one TP rank."""
    groups = max(1, model.shape.kv_heads // layout.tp)
    return 2 * model.shape.head_dim * groups * layout.width


def query_token_bytes(model: Model, layout: Layout) -> float:
    """Queries, or attention's output, of one token on one TP rank."""
    return model.shape.head_dim * model.shape.heads / layout.tp * layout.width


def received_bytes(model: Model, layout: Layout, layer: int) -> float:
    """Of a forward pass of one layer and micro-batch, on the busiest rank."""
    c = layout.cp
    if layout.exchanges_blocks(model.patterns[layer]):
        return layer_blocks(model, layout, layer).received * _row_bytes(model, layout, layer)
    tokens = layout.local_tokens(model.shape)
    if layout.cp_comm in (RING, GATHER):
        return kv_token_bytes(model, layout) * tokens * (c - 1)
    # q, k and v go in, the output comes back.
    token = 2 * query_token_bytes(model, layout) + kv_token_bytes(model, layout)
    return token * tokens * (c - 1) / c


def context_traffic(
    machine: Machine, model: Model, layout: Layout, layer: int, attention: tuple[float, float]
) -> tuple[Transfer, Transfer]:
    """A layer's exchange in its forward and in its backward pass.

    Args:
        attention: seconds of the layer's forward and backward kernels, behind which some hides.
    """
    if layout.cp == 1:
        return Transfer(), Transfer()
    size, forward, backward = received_bytes(model, layout, layer), *attention
    if layout.exchanges_blocks(model.patterns[layer]):
        once = _exchange(machine, layout, size, 1, forward)
        return once, _exchange(machine, layout, size, 2, backward)
    if layout.cp_comm == RING:
        return _ring(machine, layout, size, forward), _ring(machine, layout, 2 * size, backward)
    if layout.cp_comm == GATHER:
        whole = size * layout.cp / (layout.cp - 1)
        seconds, _ = gather_seconds(machine, whole, layout.cp, stride=layout.tp)
        return Transfer.waited_for(size, seconds), Transfer.waited_for(2 * size, 2 * seconds)
    # Two all-to-alls each way: q, k and v in, the output back.
    seconds = 2 * all_to_all_seconds(machine, size / 2, layout.cp, stride=layout.tp)
    once = Transfer.waited_for(size, seconds)
    return once, once


def _exchange(
    machine: Machine, layout: Layout, size: float, times: int, attention: float
) -> Transfer:
    """All-to-alls of blocks, cut into groups of KV heads: the first group's is waited for, and the
    others run behind the kernels of the group before."""
    groups = machine.assumptions.exchange_groups
    seconds = times * all_to_all_seconds(machine, size, layout.cp, stride=layout.tp)
    longer = max(0.0, seconds - attention) * (groups - 1) / groups
    return Transfer(times * size, seconds, seconds / groups + longer)


def _ring(machine: Machine, layout: Layout, size: float, attention: float) -> Transfer:
    """c - 1 hops, each behind one of c equal parts of attention."""
    hops = layout.cp - 1
    hop = hop_seconds(machine, size / hops, layout.cp, stride=layout.tp)
    return Transfer(size, hops * hop, hops * max(0.0, hop - attention / layout.cp))


def copied_bytes(model: Model, layout: Layout, layer: int) -> tuple[float, float]:
    """Memory traffic that the exchange of blocks adds, forward and backward.

    What attention/context_parallel.py does around its kernels, in reads and writes. Forward, rows
    are picked to be sent (2), and those for the rank itself are copied (2). The buffers before the
    chunks are filled with rows (2), or with 0 where there is none (1), and joined to the chunks'
    own keys (2). Backward the same. Then the rows' gradients, which begin with 0 (1), are added up
    over the buffers (3). They are sent home, to the rank itself by a copy (2), and added (1) to
    those of the rank's own tokens (2). The kernels write the rest where it belongs. lse, an
    eightieth, is left out.

    tests/planner/test_context_copies.py counts the same in the operations that run.
    """
    pattern = model.patterns[layer]
    if layout.cp == 1 or not layout.exchanges_blocks(pattern):
        return 0.0, 0.0
    blocks, row = layer_blocks(model, layout, layer), _row_bytes(model, layout, layer)
    own = kv_token_bytes(model, layout) * layout.local_tokens(model.shape)
    rows = blocks.received + blocks.itself
    buffers = blocks.before + blocks.filled  # twice what is filled, once what is not
    forward = row * (2 * rows + 2 * blocks.itself + buffers) + 2 * own
    gradients = rows + 3 * blocks.filled + 2 * blocks.itself + rows + 2 * blocks.asked
    return forward, forward + row * gradients


def buffer_bytes(model: Model, layout: Layout, layer: int) -> float:
    """What attention holds while it runs backward, beside what was saved; 0 without CP.

    Without CP another part of the layer (`memory._working`) holds more.
    """
    if layout.cp == 1:
        return 0.0
    tokens = layout.local_tokens(model.shape)
    own = kv_token_bytes(model, layout) * tokens
    queries = query_token_bytes(model, layout) * tokens
    if layout.exchanges_blocks(model.patterns[layer]):
        blocks, row = layer_blocks(model, layout, layer), _row_bytes(model, layout, layer)
        # Rows that were sent, those that came, and these ones' gradients; the last chunk's buffer;
        # dK and dV, with what buffers reach into before them; the gradients of the output and of q.
        rows = 3 * (blocks.received + blocks.itself) + blocks.last_before + blocks.lead
        return row * rows + 1.5 * own + 2 * queries
    if layout.cp_comm == RING:
        return 4 * own + 2 * queries  # K and V, dK and dV, each here and on its way
    if layout.cp_comm == GATHER:
        return 2 * own * layout.cp + 2 * queries  # all of K and V, and of their gradients
    return 2 * (own + 2 * queries)  # what was sent beside what came


def _row_bytes(model: Model, layout: Layout, layer: int) -> float:
    """One block of K and V of one KV head."""
    return block_bytes(
        model.patterns[layer],
        batch=layout.micro_batch,
        head_sizes=2 * model.shape.head_dim,
        element_bytes=layout.width,
    )
