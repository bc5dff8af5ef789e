"""A cache that evicts on a GPU: prefill by the training kernels, decoding by Triton, graphs."""

import pytest
import torch
import transformers

import s2megatron.hf as s2hf
from s2_kernels import dense, local_stride
from s2_kernels.record import record
from s2megatron.serving.cache import PagedCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    """Float32, so that another order of adding does not choose another token."""
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=16384,
        initializer_range=0.15,
    )  # fmt: skip
    shape = dict(heads=8, kv_heads=2, block_size=64)
    sparse = local_stride(**shape, local_blocks=4, stride=4)
    config.s2 = record((dense(**shape), sparse, sparse))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2")
    return model.eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 512, (2, 1500), device="cuda")


@pytest.mark.parametrize("graph", [False, True])
def test_tokens_are_those_of_one_pass(model, ids, graph):
    got = s2hf.generate(model, ids, max_new_tokens=300, graph=graph, **GREEDY)
    with torch.no_grad():
        logits = model(got, use_cache=False).logits[:, 1499:-1]
    chosen = logits.gather(-1, got[:, 1500:, None])[..., 0]
    # Where two tokens are as likely as rounding tells, either may have been taken.
    assert (logits.amax(-1) - chosen).max() < 1e-3
    assert (logits.argmax(-1) == got[:, 1500:]).float().mean() > 0.99


def test_a_graph_gives_the_bits_of_steps_that_run_as_usual(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :333] = 0
    results = []
    for graph, fuse in ((False, False), (True, False), (True, True)):
        cache = PagedCache(model, batch_size=2, max_length=1700, graph=graph, fuse=fuse)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
                     for i in range(150)]  # fmt: skip
        results.append(torch.cat(steps, dim=1))
        assert cache.kept_bytes < cache.dense_bytes
    plain, captured, fused = results
    assert torch.equal(captured, plain)
    assert (fused - plain).abs().max() < 1e-4 * plain.abs().max()


def test_chunks_attend_to_pages(model, ids):
    cache = PagedCache(model, batch_size=2, max_length=1500)
    cache.k_pages.fill_(torch.nan)
    cache.v_pages.fill_(torch.nan)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cuts = (100, 1, 1299, 100)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-3
