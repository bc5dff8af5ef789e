"""What a CUDA graph of a step that only decodes would hold, without a GPU.

A graph repeats the kernels of its capture with the addresses they had. So whatever differs from
step to step must come out of tensors that vLLM keeps (page tables, lengths), and the host must read
none of it. `make_fx` records a step by the same rule: what the host reads becomes a constant, or an
error. The kernels, which a GPU runs, are stood in for by sums over what they are given.
"""

from types import SimpleNamespace

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import s2_vllm.backend as backend

ROWS, BLOCKS = 3, 8


def graphs(engine, model) -> dict:
    """Of every attention layer whether a recorded step, with other tables, is as one computed."""
    config = engine.vllm_config
    layers = [layer for layer in model.modules() if isinstance(layer, backend.S2Attention)]
    support = backend.S2MetadataBuilder.get_cudagraph_support(config, layers[0].specs[0])
    return {
        "support": support.name,
        "modes": {asked: resolved_mode(asked, support) for asked in ("FULL_AND_PIECEWISE", "FULL")},
        "replayed": [replays(layer, config) for layer in layers],
        "pools": [len(layer.pools) for layer in layers],
    }


def resolved_mode(asked: str, support) -> str:
    """What vLLM makes of a mode that a user asks for, with what our builder declares."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    compiled = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    compiled.set_splitting_ops_for_v1("")
    compiled.cudagraph_mode = CUDAGraphMode[asked]
    return compiled.resolve_cudagraph_mode_and_sizes(support, "S2Backend", 1).name


def replays(layer, config) -> bool:
    heads = (layer, *layer.other_heads)
    builders = {
        head.layer_name: backend.S2MetadataBuilder(spec, [head.layer_name], config, "cpu")
        for head, spec in zip(heads, layer.specs, strict=True)
    }
    assert layer.pools  # found before anything is recorded

    def step(q, k, v, lengths, *tables):
        common = (
            SimpleNamespace(block_table_tensor=table, seq_lens=lengths, max_query_len=1,
                            seq_lens_cpu_upper_bound=None,
                            query_start_loc_cpu=torch.arange(ROWS + 1))
            for table in tables
        )  # fmt: skip
        metadata = {
            name: builder.build_for_cudagraph_capture(one)
            for (name, builder), one in zip(builders.items(), common, strict=True)
        }
        stand_in = dict(
            get_forward_context=lambda: SimpleNamespace(attn_metadata=metadata),
            write_pages=write,
            paged_attention=attend,
        )
        kept = {name: getattr(backend, name) for name in stand_in}
        vars(backend).update(stand_in)
        try:
            own = metadata[layer.layer_name]
            return layer.impl.forward(layer, q, k, v, layer.kv_cache, own, torch.zeros_like(q))
        finally:
            vars(backend).update(kept)

    recorded = make_fx(step)(*tensors(layer, len(heads), seed=1))
    other = tensors(layer, len(heads), seed=2)
    return torch.equal(recorded(*other), step(*other))


def attend(q, k_pages, v_pages, table, lengths, pattern, **_):
    """[r, 1, h, d] from everything that the kernel is given."""
    factor = table.sum((1, 2)) * 100 + lengths
    return q * factor[:, None, None, None] + pattern.kv_heads


def write(k, v, k_pages, v_pages, table, lengths, pattern, **_):
    assert k.shape == v.shape == (ROWS, 1, pattern.kv_heads, k.shape[-1])
    assert table.shape == (ROWS, pattern.kv_heads, BLOCKS) and lengths.shape == (ROWS,)


def tensors(layer, heads: int, seed: int) -> list[torch.Tensor]:
    """q, k, v, lengths and a table a head; the last row pads the graph."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, layer.num_heads, layer.head_size, generator=random)
    k, v = (
        torch.randn(ROWS, layer.num_kv_heads, layer.head_size, generator=random) for _ in range(2)
    )
    lengths = torch.randint(1, 90, (ROWS,), generator=random, dtype=torch.int32)
    lengths[-1] = 0
    tables = [
        torch.randint(0, 50, (ROWS, BLOCKS), generator=random, dtype=torch.int32)
        for _ in range(heads)
    ]
    return [q, k, v, lengths, *tables]
