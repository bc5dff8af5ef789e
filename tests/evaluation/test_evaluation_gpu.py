"""128k tokens on one GPU: what is evaluated there must fit, and be what the CPU computes."""

import json
import random
import time

import pytest
import torch
from convert_models import make_model

from s2_kernels import local_stride
from s2_kernels.record import record
from s2megatron.evaluation.network import load_network
from s2megatron.evaluation.retrieval import make_document
from s2megatron.evaluation.scoring import score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
VOCAB, LONG = 32768, 131072


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 12 layers, hidden 768, 12 heads of 64, with an s2 key."""
    folder = tmp_path_factory.mktemp("llama")
    make_model(
        "llama", folder, torch.bfloat16, vocab_size=VOCAB, hidden_size=768, head_dim=64,
        intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=LONG, initializer_range=0.02,
    )  # fmt: skip
    pattern = local_stride(heads=12, block_size=64, local_blocks=8, stride=8, head_step=1)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"s2": record((pattern,) * 12)}))
    return folder


@pytest.mark.parametrize("attention", ["s2", "dense"])
def test_long_windows_and_documents_fit(folder, attention):
    network = load_network(folder, attention)
    tokens = torch.randint(0, VOCAB, (1, LONG + 1), generator=torch.Generator().manual_seed(0))
    network.token_losses(tokens)  # kernels are compiled
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    losses = network.token_losses(tokens)
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30
    print(f"{attention}: {LONG:,} tokens in {seconds:.2f} s, peak {peak:.1f} GiB")
    assert losses.shape == (1, LONG) and losses.isfinite().all()
    assert peak < 16  # the logits of all tokens alone would take 16 in float32
    document = make_document("multi_key", lambda t: list(t.encode()), LONG, random.Random(0))
    ((result,),) = score(network, [document])
    assert not result[0]


@pytest.mark.parametrize("attention", ["s2", "dense"])
def test_the_gpu_computes_what_the_cpu_does(folder, attention):
    tokens = torch.randint(0, VOCAB, (1, 1025), generator=torch.Generator().manual_seed(1))
    losses = [
        load_network(folder, attention, device=device, dtype=dtype).token_losses(tokens)
        for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"))
    ]
    assert (losses[0] - losses[1]).abs().max() < 0.02
    assert (losses[0] - losses[2]).mean().abs() < 0.01
