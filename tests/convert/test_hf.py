"""Attention "s2" in transformers against a dense mask: forward, backward, cache, padding."""

import copy
import json

import pytest
import torch
import transformers
from convert_models import MODELS, S2, SMALL, make_model, run_tree, tokens
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


pytestmark = pytest.mark.usefixtures("one_thread")


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


PACKED = torch.cat([torch.arange(30), torch.arange(40)])[None]
HOLE = torch.ones(2, 70, dtype=torch.long).index_fill(1, torch.tensor([5]), 0)
# every way of calling a model with one more argument
WAYS = {
    "cache": {},
    "no-cache": {"use_cache": False},
    "all-ones-mask": {"attention_mask": torch.ones(2, 70, dtype=torch.long)},
    "all-ones-mask-no-cache": {"attention_mask": torch.ones(2, 70).bool(), "use_cache": False},
}
REFUSED = {
    "packed": ({"position_ids": PACKED}, "packed sequences"),
    "packed-rows": ({"position_ids": PACKED.expand(2, -1)}, "packed sequences"),
    "positions-left-out": ({"position_ids": PACKED + 100 * (PACKED > 29)}, "packed sequences"),
    "cu_seq_lens": ({"cu_seq_lens_q": torch.tensor([0, 30, 70])}, "cu_seq_lens_q"),
    "seq_idx": ({"seq_idx": (torch.arange(70) >= 30).int()[None]}, "seq_idx"),
    "hole": ({"attention_mask": HOLE}, "zeros between ones"),
    "3-D": ({"attention_mask": torch.ones(2, 70, 70).tril()}, "shape [2, 70, 70]"),
    "4-D": ({"attention_mask": torch.ones(2, 1, 70, 70).bool().tril()}, "4-D attention_mask"),
    "4-D-added": ({"attention_mask": torch.zeros(2, 1, 70, 70)}, "4-D attention_mask"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_every_way_of_calling(model, prompt, case, way):
    arguments, reason = REFUSED[case]
    assert reason in refusal(lambda: model(prompt, **{**WAYS[way], **arguments}))


@pytest.mark.parametrize("way", WAYS)
def test_static_caches_dropout_and_sliding_windows_are_refused(folders, model, prompt, way):
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    arguments = WAYS[way] | {"past_key_values": static}
    assert "static" in refusal(lambda: model(prompt, **arguments))
    config = transformers.AutoConfig.from_pretrained(folders["llama"], attention_dropout=0.1)
    trained = s2hf.load(folders["llama"], config=config).train()
    assert "attention_dropout" in refusal(lambda: trained(prompt, **WAYS[way]))
    fields = config.to_dict() | {"sliding_window": 200, "num_hidden_layers": 1}
    windowed = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**fields), attn_implementation="s2"
    )
    assert "sliding" in refusal(lambda: windowed(prompt, **WAYS[way]))


def test_generation_with_a_static_cache_is_refused(model, prompt):
    options = dict(cache_implementation="static", max_new_tokens=2)
    ones = torch.ones_like(prompt)
    assert "static" in refusal(lambda: model.generate(prompt, attention_mask=ones, **options))


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_hands_its_positions_to_the_attention(name, folders, prompt):
    """Without them a packed batch could not be told from a plain one."""
    kind, fields, _ = MODELS[name]
    own = copy.deepcopy(fields)  # transformers writes into nested fields
    config = kind(**{**SMALL, **own, "num_hidden_layers": 1, "mlp_only_layers": []})
    config.s2 = transformers.AutoConfig.from_pretrained(folders["llama"]).s2
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2")
    assert "packed sequences" in refusal(lambda: model(prompt, position_ids=PACKED))
    model(prompt, position_ids=torch.arange(70)[None])


def test_a_document_that_starts_in_the_cache_is_refused(model, prompt):
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :30], past_key_values=cache)
        new = {"past_key_values": cache, "position_ids": torch.arange(40)[None]}
        assert "packed sequences" in refusal(lambda: model(prompt[:, 30:], **new))


def test_a_mask_of_the_new_tokens_alone_is_refused(model, prompt):
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :30], past_key_values=cache)
    short = {"past_key_values": cache, "attention_mask": torch.ones(2, 40)}
    assert "the cached ones too" in refusal(lambda: model(prompt[:, 30:], **short))


def test_positions_given_with_padding_in_front(model, prompt):
    """Counted by row as transformers does, or by token as generate does: the same logits."""
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    by_token = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        by_row = model(prompt, attention_mask=mask).logits
        got = model(prompt, attention_mask=mask, position_ids=by_token).logits
    assert (got[1, 20:] - by_row[1, 20:]).abs().max() < 1e-4
    packed = by_token.clone()
    packed[1, 50:] -= 30
    assert "packed sequences" in refusal(
        lambda: model(prompt, attention_mask=mask, position_ids=packed)
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


def test_load_takes_the_config_that_it_is_given(folders):
    config = transformers.AutoConfig.from_pretrained(folders["llama"])
    config.pad_token_id = 7
    assert s2hf.load(folders["llama"], config=config).config.pad_token_id == 7
    del config.s2
    assert s2hf.load(folders["llama"], config=config).config._attn_implementation == "sdpa"


def test_models_without_the_key(tmp_path):
    make_model("mistral", tmp_path)
    assert s2hf.load(tmp_path).config._attn_implementation == "sdpa"
    model = s2hf.load(tmp_path, attn_implementation="s2")
    with pytest.raises(ConfigError, match="no 's2' key"):
        model(tokens())
    assert "mistral" in MODELS
