"""Generation with a cache that evicts is generation without one; what does not fit is refused."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from convert_models import S2, make_model, run_tree

import s2megatron.hf as s2hf
from s2_kernels import prefill
from s2_kernels.cache import alive_pages
from s2_kernels.record import record
from s2megatron.config import parse_config
from s2megatron.errors import ConfigError
from s2megatron.hf import PagedCache
from s2megatron.serving import cache as cache_module
from s2megatron.serving import fusing
from s2megatron.serving import graph as graph_module
from s2megatron.serving.pages import PagePool, pages_needed

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_folder(name, folder, sparsity=S2, **changes):
    make_model(name, folder, **changes)
    patterns = parse_config(run_tree(name, sparsity)).sparsity.resolve(
        num_layers=4, heads=4, kv_heads=2
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"s2": record(patterns)}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Blocks of 16; a dense layer, a stride a head, ranges that end."""
    return make_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return s2hf.load(folder).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(7))


def poisoned(cache: PagedCache) -> PagedCache:
    """Pages hold NaN until something is written: reading what is dead or stale shows."""
    cache.k_pages.fill_(torch.nan)
    cache.v_pages.fill_(torch.nan)
    return cache


def test_two_hundred_tokens_past_many_evictions(model, ids):
    """Token for token what one pass without a cache chooses at every position."""
    prompt = ids[:1, :50]
    cache = poisoned(PagedCache(model, max_length=250))
    got = s2hf.generate(model, prompt, cache=cache, max_new_tokens=200, **GREEDY)
    with torch.no_grad():
        logits = model(got, use_cache=False).logits
    assert got.shape == (1, 250)
    assert torch.equal(got[:, 50:], logits[:, 49:-1].argmax(-1))
    # Only what is alive has a page: 12 blocks of 16 in layer 1, which is dense, fewer elsewhere.
    alive = sum(alive_pages(pattern, 249) for pattern in cache.patterns)
    assert cache.pool.taken == alive < 0.65 * 4 * 2 * 16
    assert cache.kept_bytes == alive * 2 * 16 * 32 * 4
    assert cache.dense_bytes == 4 * 2 * 249 * 2 * 32 * 4


def test_every_step_frees_what_is_dead(model, ids):
    cache = PagedCache(model, max_length=90)
    with torch.no_grad():
        for n, step in enumerate(ids[:1, :90].split(1, dim=1), 1):
            model(step, past_key_values=cache)
            assert cache.pool.taken == sum(alive_pages(p, n) for p in cache.patterns)
    assert cache.pool.taken < cache.pool.pages <= pages_needed(cache.patterns, 1, 90)


@pytest.mark.parametrize("fewest", [32, 1000])
@pytest.mark.parametrize("cuts", [(64, 64, 64), (33, 1, 100, 58), (1, 191), (16, 176)])
def test_a_conversation_in_turns_gives_the_logits_of_one_pass(
    model, ids, cuts, fewest, monkeypatch
):
    """Chunks of a prompt's continuation attend to pages, in parts where they are long."""
    monkeypatch.setattr(cache_module, "PREFILL_TOKENS", 48)
    monkeypatch.setattr(prefill, "FEWEST", fewest)  # from so many on by the training kernels
    text = ids[:, :192]
    cache = poisoned(PagedCache(model, max_length=192, batch_size=2))
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in text.split(cuts, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4


def test_generation_goes_on_with_a_cache(model, ids):
    whole = s2hf.generate(model, ids[:1, :40], max_new_tokens=30, **GREEDY)
    cache = PagedCache(model, max_length=120)
    turn = s2hf.generate(model, ids[:1, :40], cache=cache, max_new_tokens=30, **GREEDY)
    assert torch.equal(turn, whole)
    text = torch.cat([turn, ids[:1, 200:230]], dim=1)
    got = s2hf.generate(model, text, cache=cache, max_new_tokens=20, **GREEDY)
    assert torch.equal(got, s2hf.generate(model, text, max_new_tokens=20, **GREEDY))
    with pytest.raises(ValueError, match="cannot go back"):
        s2hf.generate(model, text, cache=cache, max_new_tokens=1, **GREEDY)


@pytest.mark.parametrize("padding", [16, 41])
def test_left_padded_batch_is_each_sequence_alone(model, ids, padding):
    prompt, short = ids[:, :70], ids[1:, padding:70]
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    options = dict(max_new_tokens=40, **GREEDY)
    got = s2hf.generate(model, prompt * mask, attention_mask=mask, **options)
    assert torch.equal(got[:1], s2hf.generate(model, ids[:1, :70], **options))
    assert torch.equal(got[1:, padding:], s2hf.generate(model, short, **options))


def test_padding_longer_than_the_first_chunk(model, ids):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    cache = poisoned(PagedCache(model, max_length=64, batch_size=2))
    with torch.no_grad():
        whole = model(ids[:, :60], attention_mask=mask, use_cache=False).logits
        for low, high in ((0, 12), (12, 30), (30, 60)):
            part = model(
                ids[:, low:high], attention_mask=mask[:, :high], past_key_values=cache
            ).logits
            real = mask[:, low:high].bool()
            assert (part - whole[:, low:high])[real].abs().max() < 1e-4
        with pytest.raises(ValueError, match="begins at token 5"):
            mask[1, 5:] = 1
            more = torch.ones(2, 61, dtype=torch.long)
            more[:, :60] = mask
            model(ids[:, 60:61], attention_mask=more, past_key_values=cache)


def test_sampling_takes_the_same_tokens_as_a_cache_that_keeps_all(model, ids):
    options = dict(max_new_tokens=30, do_sample=True, top_k=20, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(3)
    expected = model.generate(ids[:1, :40], num_return_sequences=2, **options)
    torch.manual_seed(3)
    got = s2hf.generate(model, ids[:1, :40], num_return_sequences=2, **options)
    assert torch.equal(got, expected)


def test_a_mixture_of_experts_generates(tmp_path, ids):
    model = s2hf.load(make_folder("qwen3_moe", tmp_path)).eval()
    options = dict(max_new_tokens=20, **GREEDY)
    expected = model.generate(ids[:1, :40], **options)
    assert torch.equal(s2hf.generate(model, ids[:1, :40], **options), expected)


def test_memory_at_128k_is_what_is_alive():
    """1.3B's heads, window 1,024, stride 16, no dense layers: 13 times less than dense."""
    layer = parse_config({
        "sparsity": {"block_size": 64, "default": {"local_blocks": 16, "stride": 16}},
        "megatron": {"num_layers": 24, "num_attention_heads": 16}, "data": {"mock": True},
    }).sparsity.resolve(num_layers=24, heads=16, kv_heads=16)  # fmt: skip
    alive = sum(alive_pages(pattern, 131072) for pattern in layer)
    pool = pages_needed(layer, 1, 131072)
    assert alive <= pool < 1.1 * alive
    assert 24 * 16 * 2048 / pool > 13


@pytest.fixture
def graphs_of_the_cpu(monkeypatch):
    """Replays run what was captured again: of a captured step the host does nothing else."""
    replays = []

    def capture(forward):
        out = torch.zeros(2, 1, 128)

        def replay():
            replays.append(out.copy_(forward()))

        return replay, out

    monkeypatch.setattr(graph_module, "capture", capture)
    return replays


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_step_is_known_by_either_name_of_its_cache(monkeypatch, name):
    """transformers 5.24 calls it `cache`; under another name a graph never ran, without a word."""
    monkeypatch.setattr(graph_module, "CACHE", "cache")
    graph = object.__new__(graph_module.DecodeGraph)
    graph.takes, graph.run = lambda model, arguments: True, lambda arguments: "captured"
    model = torch.nn.Identity()
    model.forward = lambda **arguments: "as usual"
    graph_module.replace_forward(model)
    assert model.forward(**{name: SimpleNamespace(graph=graph)}) == "captured"
    assert model.forward(**{name: None}) == model.forward() == "as usual"


def test_captured_steps_give_the_same_tokens(folder, ids, graphs_of_the_cpu):
    """With padding; the host takes and frees pages around every replay; a second text, too."""
    model = s2hf.load(folder).eval()
    mask = torch.ones_like(ids[:, :50])
    mask[1, :21] = 0
    options = dict(attention_mask=mask, max_new_tokens=60, **GREEDY)
    expected = s2hf.generate(model, ids[:, :50], **options)
    cache = poisoned(PagedCache(model, max_length=110, batch_size=2))
    cache.graph = graph_module.DecodeGraph(model, cache, fuse=False)
    for _ in range(2):
        got = s2hf.generate(model, ids[:, :50], cache=cache, **options)
        assert torch.equal(got, expected)
        live = sum(alive_pages(p, 109) + alive_pages(p, 109 - 21) for p in cache.patterns)
        assert cache.pool.taken == live and cache.total == 109
        cache.reset()
    assert len(graphs_of_the_cpu) == 2 * 58  # 59 steps after each prompt, the first as usual


def test_nothing_is_compiled_while_a_fused_step_is_captured(
    folder, ids, graphs_of_the_cpu, monkeypatch
):
    """The first step, which compiles, has the shapes of the captured one, whatever it is given."""
    monkeypatch.setattr(fusing, "no_compiler", lambda device: None)
    monkeypatch.setattr(fusing, "Fusion", functools.partial(fusing.Fusion, backend="eager"))
    model = s2hf.load(folder).eval()
    caches = [PagedCache(model, max_length=60, batch_size=2) for _ in range(2)]
    caches[1].graph = graph_module.DecodeGraph(model, caches[1], fuse=True)
    stats = torch._dynamo.utils.counters["stats"]
    compiled, before = [], stats["unique_graphs"]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :40], past_key_values=cache)
        for n in range(40, 44):
            step = ids[:, n : n + 1]
            got = [model(step, past_key_values=caches[0]).logits,
                   model(input_ids=step, past_key_values=caches[1]).logits]  # fmt: skip
            assert torch.equal(*got)
            compiled.append(stats["unique_graphs"] - before)
    assert len(graphs_of_the_cpu) == 3 and 0 < compiled[0] == compiled[-1]


def test_a_step_is_captured_again_when_its_weights_were_moved(folder, ids, monkeypatch):
    """Making a fused cache merges weights: a graph from before would read freed memory."""
    captured = []

    def capture(forward):
        captured.append(forward)
        return lambda: out.copy_(forward()), (out := torch.zeros(1, 1, 128))

    monkeypatch.setattr(graph_module, "capture", capture)
    model = s2hf.load(folder).eval()
    cache = PagedCache(model, max_length=60)
    cache.graph = graph_module.DecodeGraph(model, cache, fuse=False)
    with torch.no_grad():
        model(ids[:1, :40], past_key_values=cache)
        for n in range(40, 46):
            if n == 43:
                fusing.Fusion(model, backend="eager")
            model(input_ids=ids[:1, n : n + 1], past_key_values=cache)
    assert len(captured) == 2


def test_steps_that_ask_for_more_run_as_usual(folder, ids, graphs_of_the_cpu):
    model = s2hf.load(folder).eval()
    cache = PagedCache(model, max_length=60)
    cache.graph = graph_module.DecodeGraph(model, cache, fuse=False)
    with torch.no_grad():
        model(ids[:1, :40], past_key_values=cache)
        for n in range(40, 44):
            step = model(ids[:1, n : n + 1], past_key_values=cache, output_hidden_states=True)
        assert step.hidden_states is not None
        model(ids[:1, 44:46], past_key_values=cache)
    assert not graphs_of_the_cpu and cache.total == 46


def refusal(function, *args, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    return str(error.value)


def test_what_goes_back_is_refused(model, ids):
    options = dict(max_new_tokens=4, **GREEDY)
    prompt = ids[:1, :40]
    assert "beam search" in refusal(s2hf.generate, model, prompt, num_beams=2,
                                    cache=PagedCache(model, max_length=50, batch_size=2),
                                    **options)  # fmt: skip
    assert "assisted" in refusal(
        s2hf.generate, model, prompt, prompt_lookup_num_tokens=3, **options
    )
    cache = PagedCache(model, max_length=50)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        back = torch.tensor([[7]])
        assert "goes back to position 7" in refusal(
            model, back, past_key_values=cache, position_ids=back
        )
    assert "cannot go back" in refusal(cache.crop, -3)


def test_what_does_not_fit_is_refused(model, ids, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    needed = pages_needed(s2hf.PagedCache(model, max_length=100).patterns, 2, 100)
    options = dict(max_length=100, batch_size=2)
    assert f"need {needed} pages" in refusal(PagedCache, model, pages=needed - 1, **options)
    assert PagedCache(model, pages=needed, **options).pool.pages == needed
    assert "leave it out off a GPU" in refusal(PagedCache, model, graph=True, **options)
    assert "must be at least 1" in refusal(PagedCache, model, max_length=0)
    assert "max_new_tokens" in refusal(s2hf.generate, model, ids)
    full = PagedCache(model, max_length=10)
    with torch.no_grad():
        assert "max_length=10: 0 tokens are in it and 11 more come" in refusal(
            model, ids[:1, :11], past_key_values=full
        )
        assert "batch_size=1" in refusal(model, ids[:, :5], past_key_values=full)
        assert "need a GPU" in refusal(model, ids[:1, :5], past_key_values=on_triton(model))
        dense = s2hf.load(folder, attn_implementation="sdpa")
        assert "load it with" in refusal(PagedCache, dense, max_length=10)
        other = s2hf.load(make_folder("llama", tmp_path, num_hidden_layers=4,
                                      sparsity=S2 | {"layers": []}))  # fmt: skip
        assert "made for another model: layer 1" in refusal(
            other, ids[:1, :5], past_key_values=full
        )
        assert "float64" in refusal(other.double(), ids[:1, :5], past_key_values=full)


def on_triton(model):
    return PagedCache(model, max_length=10, backend="triton")


def test_patterns_that_do_not_fit_the_heads_are_refused(model):
    config = model.config
    kept = config.s2
    try:
        config.s2 = kept | {"groups": [g | {"heads": 8} for g in kept["groups"]]}
        assert "for 8 heads and 2 KV heads, the model has 4 and 2" in refusal(
            PagedCache, model, max_length=10
        )
        groups = kept["groups"]
        config.s2 = kept | {"groups": [groups[0] | {"block_size": 32}, *groups[1:]]}
        assert "pages of one pool have one size" in refusal(PagedCache, model, max_length=10)
        config.s2 = None
        assert "no 's2' key" in refusal(PagedCache, model, max_length=10)
    finally:
        config.s2 = kept


def test_a_pool_that_runs_dry_says_so(model):
    pool = PagePool(s2hf.PagedCache(model, max_length=64).patterns, 1, 64, 3, "cpu")
    with pytest.raises(ConfigError, match="the page pool is too small: 3 pages"):
        pool.grow(0, 0, 0, 64, alive_only=False)


def test_other_attention_than_s2_says_what_the_cache_is_for(model, ids):
    cache = PagedCache(model, max_length=20)
    model.set_attn_implementation("sdpa")
    try:
        assert "attention 's2'" in refusal(model, ids[:1, :5], past_key_values=cache)
    finally:
        model.set_attn_implementation("s2")
    assert "taken" in repr(cache) and transformers.Cache in PagedCache.__mro__
