"""Attention "s2" in transformers against a dense mask: forward, backward, cache, padding."""

import json

import pytest
import torch
import transformers
from convert_models import MODELS, S2, make_model, run_tree, tokens
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import s2megatron.hf as s2hf
from s2_kernels.record import record
from s2megatron.config import parse_config
from s2megatron.errors import ConfigError

GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def masked(module, query, key, value, attention_mask, scaling, **_):
    """SDPA with the pattern's mask written out, token by token: no code of s2_kernels runs."""
    pattern = s2hf.layer_pattern(module)
    size, length = pattern.block_size, key.shape[2]
    blocks = pattern.block_mask(-(-length // size))
    kept = blocks.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :length, :length]
    kept = kept & torch.ones(length, length, dtype=torch.bool).tril()
    group = pattern.heads // pattern.kv_heads
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=kept.repeat_interleave(group, dim=0), scale=scaling
    )
    return out.transpose(1, 2), None


AttentionInterface.register("s2_masked", masked)
AttentionMaskInterface.register("s2_masked", lambda **_: None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with an s2 key, as to-hf writes it."""
    folders = {}
    for name in ("llama", "qwen2", "qwen3_moe"):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        make_model(name, folder)
        patterns = parse_config(run_tree(name, S2)).sparsity.resolve(
            num_layers=4, heads=4, kv_heads=2
        )
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"s2": record(patterns)}))
    return folders


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
def test_forward_and_backward(folders, name):
    results = []
    for attention in ("s2", "s2_masked"):
        model = s2hf.load(folders[name], attn_implementation=attention)
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        results.append((out.logits, {n: p.grad for n, p in model.named_parameters()}))
    (logits, grads), (expected, expected_grads) = results
    assert (logits - expected).abs().max() < 1e-4
    for key, grad in expected_grads.items():
        assert (grads[key] - grad).abs().max() < 1e-4 * max(1, grad.abs().max()), key


@pytest.fixture(scope="module")
def model(folders):
    return s2hf.load(folders["llama"]).eval()


@pytest.fixture(scope="module")
def prompt():
    return tokens()[:, :70]


@pytest.fixture(scope="module")
def generated(model, prompt):
    """[2, 82]: greedy, with a KV cache."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)


def test_generation_with_a_cache_is_generation_without(model, prompt, generated):
    tokens_so_far = prompt
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            logits = model(tokens_so_far, use_cache=False).logits
            tokens_so_far = torch.cat([tokens_so_far, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens_so_far)


def test_cached_chunks_give_the_logits_of_one_pass(model, prompt):
    with torch.no_grad():
        whole = model(prompt).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(p, past_key_values=cache).logits for p in prompt.split([33, 1, 36], dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("padding", [16, 41])
def test_left_padded_batch_is_each_sequence_alone(model, prompt, generated, padding):
    """Logits and greedy tokens; the block grid starts at the first real token."""
    short = prompt[1:, padding:]
    batch = torch.cat([prompt[:1], torch.nn.functional.pad(short, (padding, 0), value=7)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    with torch.no_grad():
        alone = model(short).logits
        together = model(batch, attention_mask=mask).logits
    assert (together[1, padding:] - alone[0]).abs().max() < 1e-4
    expected = model.generate(short, attention_mask=torch.ones_like(short), **GREEDY)
    got = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(got[0], generated[0])
    assert torch.equal(got[1, padding:], expected[0])


def test_left_padding_in_chunks(model, prompt):
    """Padding longer than the first chunk of a chunked prefill."""
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(prompt, attention_mask=mask).logits
        model(prompt[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        rest = model(prompt[:, 12:], attention_mask=mask, past_key_values=cache).logits
    assert (rest[:, 8:] - whole[:, 20:]).abs().max() < 1e-4


def test_right_padding_changes_nothing_before_it(model, prompt):
    mask = torch.ones_like(prompt)
    mask[0, 50:] = 0
    with torch.no_grad():
        got = model(prompt, attention_mask=mask).logits
        expected = model(prompt).logits
    assert torch.equal(got[0, :50], expected[0, :50])


def refusal(function) -> str:
    with pytest.raises(ValueError) as error:
        function()
    return str(error.value)


def test_masks_that_are_not_computed_are_refused(model, prompt):
    packed = torch.cat([torch.arange(30), torch.arange(40)]).expand(2, -1)
    assert "packed sequences" in refusal(
        lambda: model(prompt, position_ids=packed, use_cache=False)
    )
    hole = torch.ones_like(prompt)
    hole[0, 5] = 0
    assert "zeros between ones" in refusal(lambda: model(prompt, attention_mask=hole))
    four = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    assert "4-D attention_mask" in refusal(lambda: model(prompt, attention_mask=four))
    assert "output_attentions" in refusal(lambda: model(prompt, output_attentions=True))
    assert "static" in refusal(
        lambda: model.generate(
            prompt, attention_mask=hole | 1, cache_implementation="static", max_new_tokens=2
        )
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 8),
        ("softcap", 30.0),
        ("is_causal", False),
        ("s_aux", torch.ones(4)),
        ("cu_seq_lens_q", torch.tensor([0, 32])),
    ],
)
def test_options_of_other_models_are_refused(model, name, value):
    layer = model.model.layers[1].self_attn
    q, k = torch.randn(1, 4, 32, 32), torch.randn(1, 2, 32, 32)
    assert name in refusal(lambda: s2hf.s2_attention_forward(layer, q, k, k, None, **{name: value}))
    assert "dropout" in refusal(
        lambda: s2hf.s2_attention_forward(layer, q, k, k, None, dropout=0.1)
    )


def test_load_picks_the_attention_up(folders, tmp_path):
    assert s2hf.load(folders["llama"]).config._attn_implementation == "s2"
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert plain.config._attn_implementation == "sdpa"
    plain.save_pretrained(tmp_path)  # the key survives transformers
    assert s2hf.load(tmp_path).config._attn_implementation == "s2"
    assert s2hf.load(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_models_without_the_key(tmp_path):
    make_model("mistral", tmp_path)
    assert s2hf.load(tmp_path).config._attn_implementation == "sdpa"
    model = s2hf.load(tmp_path, attn_implementation="s2")
    with pytest.raises(ConfigError, match="no 's2' key"):
        model(tokens())
    assert "mistral" in MODELS
