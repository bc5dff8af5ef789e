"""A model in transformers as people use it: autocast, compiled, padded, in turns, wrapped."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from convert_models import S2, tokens
from vllm_cases import change_config, make_folder

import s2megatron.hf as s2hf
from s2megatron.errors import ConfigError
from s2megatron.hf import PagedCache
from s2megatron.serving.model import recorded_patterns

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder("llama", tmp_path_factory.mktemp("llama"), S2)


@pytest.fixture(scope="module")
def model(folder):
    return s2hf.load(folder).eval()


@pytest.fixture(scope="module")
def ids():
    return tokens()[:, :70].clamp(min=3)


def refusal(function, *args, error=ValueError, **options) -> str:
    with pytest.raises(error) as raised:
        function(*args, **options)
    return str(raised.value)


# Mixed precision: what `Trainer(bf16=True)` runs in


@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_computes_attention_in_its_dtype(model, ids, monkeypatch, use_cache):
    """Rotary embeddings leave q and k in float32 there, values come in bfloat16."""
    seen, stock = [], s2hf.s2_attention

    def noting(q, k, v, *args, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return stock(q, k, v, *args, **options)

    monkeypatch.setattr(s2hf, "s2_attention", noting)
    model.zero_grad()
    exact = model(ids, labels=ids, use_cache=use_cache).loss
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=use_cache).loss
    loss.backward()
    assert seen == [{torch.bfloat16}] * 4
    assert abs(loss - exact) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_a_paged_cache_under_autocast_says_what_to_do(model, ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told = refusal(s2hf.generate, model, ids, **GREEDY)
    assert "torch.autocast" in told and "values of layer 1" in told


# What is refused says why


def test_prompts_padded_on_the_right_are_told_to_pad_on_the_left(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    for generate in (model.generate, lambda x, **o: s2hf.generate(model, x, **o)):
        assert "padding_side" in refusal(generate, ids * mask, attention_mask=mask, **GREEDY)


def test_a_mask_that_transformers_made_of_pad_token_id(model, ids):
    text = ids.clone()
    text[0, 20] = GREEDY["pad_token_id"]
    assert "holds pad_token_id" in refusal(model.generate, text, **GREEDY)
    model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)


def test_a_compiled_model_without_mask_and_cache_says_what_to_give(folder):
    script = Path(__file__).parents[1] / "support" / "compiled_model.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "under torch.compile give an attention_mask" in found["said"]
    assert found["same"]


def test_a_mask_has_a_row_for_every_sequence_or_one_for_all(model, ids):
    one = padded(ids)[1:]
    both = model(ids, attention_mask=one.expand(2, -1)).logits
    assert torch.equal(model(ids, attention_mask=one).logits, both)
    three = one.expand(3, -1)
    assert "a batch of 2" in refusal(model, ids, attention_mask=three)
    assert "a batch of 2" in refusal(model, ids, attention_mask=torch.ones_like(three))


def test_attentions_asked_for_in_the_config(folder, ids):
    config = transformers.AutoConfig.from_pretrained(folder, output_attentions=True)
    assert "output_attentions" in refusal(s2hf.load(folder, config=config), ids)


def test_heads_that_transformers_would_split(folder, model, ids):
    for options in (dict(tp_plan="auto"), dict(distributed_config=object())):
        assert "device_map" in refusal(s2hf.load, folder, error=ConfigError, **options)
    layer = model.model.layers[1].self_attn
    q, k = torch.randn(1, 2, 32, 32), torch.randn(1, 1, 32, 32)  # of one rank of two
    told = refusal(s2hf.s2_attention_forward, layer, q, k, k, None)
    assert "2 heads come to layer 2, and its pattern in config.json has 4" in told


# A cache of pages, in turns


def padded(ids) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    return mask


def test_a_turn_without_its_mask_does_not_count_positions_anew(model, ids):
    """Positions are counted from a text's first token in the first turn, from row 0 in this one."""
    cache = PagedCache(model, batch_size=2, max_length=200)
    mask = padded(ids)
    first = s2hf.generate(model, ids * mask, attention_mask=mask, cache=cache, **GREEDY)
    more = torch.cat([first, ids[:, :30]], dim=1)
    assert "are counted from row 0" in refusal(s2hf.generate, model, more.clamp(min=1),
                                               cache=cache, **GREEDY)  # fmt: skip
    whole = torch.cat([mask, torch.ones_like(more[:, ids.shape[1] :])], dim=1)
    got = s2hf.generate(model, more, attention_mask=whole, cache=cache, **GREEDY)
    assert torch.equal(got, model.generate(more, attention_mask=whole, **GREEDY))


def test_generate_after_a_forward_call_with_padding(model, ids):
    """A forward call without position_ids counts rows, generate counts tokens."""
    mask = padded(ids)
    for given, told in ((None, "row 0"), ((mask.cumsum(-1) - 1).clamp(min=0), None)):
        cache = PagedCache(model, batch_size=2, max_length=200)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=given, past_key_values=cache)
        more = torch.cat([ids, ids[:, :5]], dim=1)
        whole = torch.cat([mask, torch.ones_like(ids[:, :5])], dim=1)
        options = dict(attention_mask=whole, cache=cache, **GREEDY)
        if told is None:
            got = s2hf.generate(model, more, **options)
            assert torch.equal(got, model.generate(more, attention_mask=whole, **GREEDY))
        else:
            assert told in refusal(s2hf.generate, model, more, **options)


def test_tokens_given_again_or_left_out_are_refused(model, ids):
    cache = PagedCache(model, batch_size=2, max_length=200)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for start, told in ((0, "goes back to position 0"), (90, "goes on to position 90")):
            positions = torch.arange(start, start + 100)[None]
            options = dict(past_key_values=cache, position_ids=positions)
            assert told in refusal(model, ids[:, :1].expand(-1, 100), **options)


def test_no_gradient_goes_through_pages(model, ids):
    """On a GPU the decode kernel has none, and the CPU must not differ: refused, not dropped."""
    cache = PagedCache(model, batch_size=2, max_length=200)
    model(ids[:, :60], past_key_values=cache, labels=ids[:, :60]).loss.backward()  # no pages yet
    assert not cache.k_pages.requires_grad
    loss = model(ids[:, 60:], past_key_values=cache, labels=ids[:, 60:]).loss
    assert not cache.k_pages.requires_grad
    assert "no gradient goes through pages" in refusal(loss.backward)
    model.zero_grad()


# What generate is asked for


def test_a_generation_config_says_how_long(model, ids):
    config = transformers.GenerationConfig(**GREEDY)
    got = s2hf.generate(model, ids, generation_config=config)
    assert torch.equal(got, s2hf.generate(model, ids, **GREEDY))
    sampled = transformers.GenerationConfig(**GREEDY | dict(do_sample=True, num_return_sequences=2))
    assert s2hf.generate(model, ids, generation_config=sampled).shape == (4, 82)
    beams = transformers.GenerationConfig(**GREEDY, num_beams=2)
    assert "num_beams=2" in refusal(s2hf.generate, model, ids, generation_config=beams)


def test_what_a_generation_config_leaves_open_is_the_models(model, ids, monkeypatch):
    """As transformers fills it: how long, how many sequences, beams; an option of None clears."""
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=None)
    asked = dict(generation_config=config, attention_mask=torch.ones_like(ids))
    own = model.generation_config
    monkeypatch.setattr(own, "pad_token_id", 0)
    monkeypatch.setattr(own, "max_new_tokens", 5)
    got = s2hf.generate(model, ids, **asked)
    assert got.shape == (2, 75) and torch.equal(got, model.generate(ids, **asked))
    longer = asked | dict(generation_config=transformers.GenerationConfig(max_new_tokens=7))
    assert s2hf.generate(model, ids, **longer).shape == (2, 77)
    told = refusal(s2hf.generate, model, ids, max_new_tokens=None, **asked, error=ConfigError)
    assert "neither max_new_tokens nor max_length" in told
    monkeypatch.setattr(own, "num_return_sequences", 2)
    sampled = asked | dict(generation_config=transformers.GenerationConfig(do_sample=True))
    assert s2hf.generate(model, ids, **sampled).shape == (4, 75)
    monkeypatch.setattr(own, "num_beams", 3)
    assert "num_beams=3" in refusal(s2hf.generate, model, ids, **asked)


def test_what_generate_has_no_use_for_is_named(model, ids):
    cache = transformers.DynamicCache(config=model.config)
    for options, told in (
        (dict(use_cache=False), "use_cache=False"),
        (dict(num_beams=3), "num_beams=3"),
        (dict(cache=cache), "cache is a DynamicCache"),
        (dict(past_key_values=cache), "past_key_values"),
    ):
        assert told in refusal(s2hf.generate, model, ids, **GREEDY, **options)


def test_a_run_that_recomputed_leaves_use_cache_false(folder, model, ids, tmp_path):
    """transformers' Trainer writes it into config.json; generate is asked to use its cache."""
    model.save_pretrained(tmp_path)
    change_config(tmp_path, use_cache=False)
    (tmp_path / "generation_config.json").unlink()
    trained = s2hf.load(tmp_path).eval()
    assert trained.generation_config.use_cache is False or trained.config.use_cache is False
    assert torch.equal(s2hf.generate(trained, ids, **GREEDY), s2hf.generate(model, ids, **GREEDY))


# Folders


def test_load_looks_into_a_subfolder(folder):
    loaded = s2hf.load(folder.parent, subfolder=folder.name)
    assert loaded.config._attn_implementation == "s2"


def test_load_of_an_adapter_says_where_the_key_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "peft.PeftModel.from_pretrained" in refusal(s2hf.load, tmp_path, error=ConfigError)


def architectures(folder) -> list[str]:
    return json.loads((folder / "config.json").read_text())["architectures"]


def test_what_is_saved_again_keeps_the_name_that_other_servers_refuse(folder, tmp_path):
    """transformers writes its class, under which a server without S2 would compute dense."""
    loaded = s2hf.load(folder)
    own = type(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    assert architectures(tmp_path / "saved") == [f"S2{own.__name__}"]
    assert type(loaded) is own
    for again in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        again.model.embed_tokens.weight.data.zero_()  # a copy saves itself
        again.save_pretrained(tmp_path / "copy")
        assert architectures(tmp_path / "copy") == [f"S2{own.__name__}"]
        assert not s2hf.load(tmp_path / "copy").model.embed_tokens.weight.any()
    assert loaded.model.embed_tokens.weight.any()


def test_a_dense_model_is_saved_under_its_own_name_until_it_has_patterns(folder, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    patterns = recorded_patterns(plain.config)
    del plain.config.s2
    plain.save_pretrained(tmp_path / "dense")
    model = s2hf.load(tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense")
    assert architectures(tmp_path / "dense") == [type(model).__name__]
    s2hf.use_patterns(model, patterns)
    model.save_pretrained(tmp_path / "sparse")
    assert architectures(tmp_path / "sparse") == [f"S2{type(model).__name__}"]
    assert s2hf.load(tmp_path / "sparse").config._attn_implementation == "s2"


def test_a_save_that_fails_leaves_the_model_as_it_was(folder, tmp_path):
    loaded = s2hf.load(folder)
    own = type(loaded)
    with pytest.raises(TypeError):
        loaded.save_pretrained()
    assert type(loaded) is own
