"""A graph's cache and model: copied, forgotten, changed, interrupted, or given what it refuses."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from test_paged_cache import GREEDY, make_folder, refusal

import s2megatron.hf as s2hf
from s2megatron.hf import PagedCache
from s2megatron.serving import fusing
from s2megatron.serving import graph as graph_module
from s2megatron.serving.fusing import Fusion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder):
    """A test's own: they change it."""
    return s2hf.load(folder).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 80), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def captured(monkeypatch):
    """Captures on a CPU: replays run what was captured again. A list that grows with each."""
    captured = []

    def capture(forward):
        captured.append(1)
        made = {}

        def replay():
            result = forward()
            made.setdefault("out", torch.zeros_like(result)).copy_(result)

        return replay, _Later(made)

    monkeypatch.setattr(graph_module, "capture", capture)
    return captured


class _Later:
    """The output of a capture that has not run."""

    def __init__(self, made: dict):
        self.made = made

    def clone(self):
        return self.made["out"].clone()


def with_graph(model, fuse: bool = False, **options) -> PagedCache:
    cache = PagedCache(model, **{"max_length": 80, **options})
    cache.graph = graph_module.DecodeGraph(model, cache, fuse=fuse)
    return cache


def expected(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1:]


def steps(model, cache, ids, first: int = 40, count: int = 5):
    """Logits of the last of some steps after a prompt of `first` tokens."""
    out = None
    with torch.no_grad():
        if cache.total == 0:
            model(ids[: cache.batch, :first], past_key_values=cache)
        for n in range(first, first + count):
            out = model(input_ids=ids[: cache.batch, n : n + 1], past_key_values=cache)
    return out.logits


def test_a_copied_model_answers_for_itself(model, ids):
    graph_module.replace_forward(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(expected(made, ids), expected(model, ids))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert not expected(made, ids).any() and expected(model, ids).any()


def test_a_copied_cache_goes_on_with_the_model_that_there_is(model, ids, captured):
    cache = with_graph(model)
    steps(model, cache, ids)
    copied = copy.deepcopy(cache)
    got = [steps(model, x, ids, first=45, count=4) for x in (cache, copied)]
    assert torch.equal(*got) and len(captured) == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not steps(model, copied, ids, first=49, count=1).any()


@pytest.mark.parametrize("graph", [False, True])
def test_a_cache_that_nobody_has_any_more_frees_its_pages(model, ids, captured, graph):
    gc.collect()
    gc.disable()  # a GPU's memory runs out before Python's collector comes by
    try:
        cache = with_graph(model) if graph else PagedCache(model, max_length=80)
        steps(model, cache, ids)
        pages = weakref.ref(cache.k_pages)
        del cache
        captured.clear()
        assert pages() is None
    finally:
        gc.enable()


def called_by_name(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache)


def called_by_place(model, ids, cache):
    return model(ids, past_key_values=cache)


@pytest.mark.parametrize("call", [called_by_name, called_by_place])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_of_ones_own_loop_are_captured(model, ids, captured, call, grad):
    cache = with_graph(model)
    with torch.set_grad_enabled(grad):
        call(model, ids[:1, :40], cache)
        for n in range(40, 45):
            out = call(model, ids[:1, n : n + 1], cache)
    assert len(captured) == 1 and not out.logits.requires_grad
    assert torch.allclose(out.logits, expected(model, ids[:1, :45]), atol=1e-4)


def test_captured_steps_refuse_what_others_do(model, ids, captured):
    cache = with_graph(model, batch_size=2)
    steps(model, cache, ids)
    with torch.no_grad():
        assert "batch_size=2" in refusal(model, input_ids=ids[:1, 45:46], past_key_values=cache)
    cache = with_graph(model)
    steps(model, cache, ids)
    with torch.no_grad():
        back = refusal(model, input_ids=ids[:1, 45:46], past_key_values=cache,
                       position_ids=torch.tensor([[3]]))  # fmt: skip
        assert "goes back to position 3" in back and cache.total == 45
        again = model(input_ids=ids[:1, 45:46], past_key_values=cache,
                      position_ids=torch.tensor([[45]]), return_dict=False)  # fmt: skip
    assert isinstance(again, tuple) and torch.allclose(again[0], expected(model, ids[:1, :46]),
                                                       atol=1e-4)  # fmt: skip


def test_another_model_is_not_answered_by_the_graph(folder, model, ids, captured):
    cache, other = with_graph(model), s2hf.load(folder).eval()
    graph_module.replace_forward(other)
    steps(model, cache, ids)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not steps(other, cache, ids, first=45, count=1).any()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_that_was_interrupted_is_not_gone_on_with(model, ids, layer):
    cache = PagedCache(model, max_length=80)

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:1, :40], past_key_values=cache)
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:1, 40:60], past_key_values=cache)
        hook.remove()
        said = refusal(model, ids[:1, 60:70], past_key_values=cache)
        assert "was interrupted" in said and "40 to 60 tokens of 60" in said
        cache.reset()
        got = model(ids[:1, :70], past_key_values=cache).logits[:, -1:]
    assert torch.allclose(got, expected(model, ids[:1, :70]), atol=1e-4)


def test_a_replay_that_was_interrupted_is_not_gone_on_with(model, ids, captured):
    cache = with_graph(model)
    steps(model, cache, ids)

    def stop():
        raise KeyboardInterrupt

    cache.graph._replay = stop
    with pytest.raises(KeyboardInterrupt):
        steps(model, cache, ids, first=45, count=1)
    assert "was interrupted" in refusal(steps, model, cache, ids, first=46, count=1)


CHANGES = {
    "hook on an MLP": lambda layer: layer.mlp.register_forward_hook(lambda m, i, out: out + 1),
    "hook on a norm": lambda layer: layer.post_attention_layernorm.register_forward_hook(
        lambda m, i, out: out * 2
    ),
    "another MLP": lambda layer: setattr(layer, "mlp", doubled(copy.deepcopy(layer.mlp))),
    "a forward of its own": lambda layer: setattr(
        layer.mlp, "forward", functools.partial(one_more, layer.mlp.forward)
    ),
}


def doubled(mlp):
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(2)
    return mlp


def one_more(own, x):
    return own(x) + 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_fused_step_sees_what_was_changed_after_the_first(model, ids, change):
    fusion = Fusion(model, backend="eager")

    def fused():
        fusion.renew()
        with torch.no_grad(), fusion.active():
            return model(ids[:1, :1], use_cache=False).logits

    before = expected(model, ids[:1, :1])
    assert torch.equal(fused(), before)
    layer = model.model.layers[1]
    CHANGES[change](layer)
    own = vars(layer.mlp).get("forward")
    after = expected(model, ids[:1, :1])
    assert not torch.equal(after, before)
    assert torch.allclose(fused(), after, atol=1e-5)
    assert vars(layer.mlp).get("forward") is own  # and it stays


def test_what_did_not_change_is_not_compiled_again(model, monkeypatch):
    fusion = Fusion(model, backend="eager")
    made = []
    monkeypatch.setattr(fusing, "norms_after", made.append)
    fusion.renew()
    assert not made


def test_generation_makes_positions_that_are_not_looked_at(model, ids, captured, monkeypatch):
    looked = []
    monkeypatch.setattr(PagedCache, "refuse_other_positions", lambda *_: looked.append(1))
    cache = with_graph(model)
    s2hf.generate(model, ids[:1, :40], cache=cache, max_new_tokens=6, **GREEDY)
    assert captured and not looked and not cache.positions_count_on
