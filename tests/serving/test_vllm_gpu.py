"""vLLM on a GPU: the Triton kernels, CUDA graphs, and tokens as transformers gives them."""

import re

import pytest
import torch
from vllm_cases import chosen_tokens, make_folder, random_tokens, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SPARSITY = {
    "block_size": 64,
    "default": {"local_blocks": 2, "stride": 4},
    "layers": [{"layers": [1], "kind": "dense"}],
}
LENGTHS = (900, 37, 1401, 7, 260, 64)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_tokens_are_those_of_transformers(eager, tmp_path):
    """float32, so that rounding does not choose; a second round comes out of the prefix cache."""
    (tmp_path / "llama").mkdir()
    folder = make_folder("llama", tmp_path / "llama", SPARSITY, num_attention_heads=8,
                         num_key_value_heads=4, head_dim=64)  # fmt: skip
    prompts = random_tokens(*LENGTHS)
    texts = dict(prompts=prompts, max_tokens=100)
    options = dict(max_model_len=2048, max_num_batched_tokens=256, max_num_seqs=4,
                   gpu_memory_utilization=0.3, enforce_eager=eager)  # fmt: skip
    jobs = [dict(folder=str(folder), options=options, rounds=[texts, texts])]
    (report,) = serve(jobs, tmp_path, changes={})
    tokens = report["rounds"][0]["tokens"]
    assert tokens == chosen_tokens(folder, prompts, tokens, "cuda") == report["rounds"][1]["tokens"]
    assert sum(report["rounds"][1]["cached"]) > 2000
    log = (tmp_path / "log.txt").read_text()
    assert "kernels ready in" in log
    assert not re.search(r"compilation during inference: s2_\w+", log)  # vLLM's own monitor
    assert all(one["free_after"] == report["pages"] - 1 for one in report["rounds"])
