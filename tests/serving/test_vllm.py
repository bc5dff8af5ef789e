"""vLLM on the CPU serves tiny S2 models: tokens as transformers gives them, and no page is lost."""

import shutil
from collections import Counter

import pytest
from vllm_cases import (
    chosen_tokens,
    environment,
    make_folder,
    random_tokens,
    serve,
    shortfall,
)

from s2_kernels import local_stride, ranges
from s2_kernels.versions import installed_triton, prepares_launches

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 40
SPARSITY = {
    "block_size": 16,
    "default": {"local_blocks": 2, "stride": 4},
    "layers": [
        {"layers": [1], "kind": "dense"},
        {"layers": [4], "ranges": [{"reach": 2, "stride": 1}, {"reach": 6, "stride": 2}],
         "dense_heads": 1},
    ],
}  # fmt: skip
HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
LONGEST = 448
SHAPE = dict(heads=8, kv_heads=4, block_size=16)
PATTERNS = {
    "stride": local_stride(**SHAPE, local_blocks=2, stride=8),
    "ranges": ranges(**SHAPE, bands=[(2, 1), (6, 2), (20, 4)]),
    "heads": local_stride(**SHAPE, local_blocks=3, stride=[2, 4, 4, 8], dense_heads=1),
}


LOW_PRECISION = ("bfloat16", "float16")
COMPILED_FOR = ("bfloat16", "float32")
STUB = None if shutil.which("gcc") else "Triton's launcher is compiled with gcc"
if not prepares_launches(installed_triton()):
    STUB = "the stub driver takes Triton 3.6 only"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    environment(tmp_path_factory.mktemp("skipped"))
    return make_folder("llama", tmp_path_factory.mktemp("llama"), SPARSITY, **HEADS)


@pytest.fixture(scope="module")
def prompts():
    shared, other, long, short = random_tokens(300, 37, 401, 7)
    return [shared, shared[:250] + other, long, short, long[:77], other]


@pytest.fixture(scope="module")
def short(prompts):
    """Admitted together, because what they will grow to is not known."""
    return [prompts[0][:50], *prompts[3:]]


GROWN = 170


def twins(prompts):
    """Texts that begin the same; all in one step."""
    begin, end = prompts[2][:64], prompts[3]
    return [begin, begin + end, begin[:48] + end]


@pytest.fixture(scope="module")
def reports(folder, prompts, short, tmp_path_factory):
    """Of a cache with room, and of one that is too small for all requests at once."""
    options = dict(max_model_len=LONGEST, max_num_batched_tokens=48, max_num_seqs=4)
    texts = dict(prompts=prompts, max_tokens=NEW)
    cancelled = texts | dict(cancel={"0": 2, "2": 9, "3": 12, "5": 20})
    growing = dict(prompts=short, max_tokens=GROWN)
    jobs = {
        "roomy": (2000, [texts, texts, cancelled, texts]),
        "tight": (360, [texts, growing, texts]),
    }
    jobs = {
        name: dict(folder=str(folder), rounds=rounds,
                   options=dict(num_gpu_blocks_override=pages, **options))
        for name, (pages, rounds) in jobs.items()
    }  # fmt: skip
    ranks = dict(tensor_parallel_size=2, distributed_executor_backend="mp",
                 num_gpu_blocks_override=2000)  # fmt: skip
    jobs["roomy"]["graphs"] = True
    wide = options | dict(max_num_batched_tokens=150, num_gpu_blocks_override=2000)
    together = dict(prompts=twins(prompts), max_tokens=NEW, forget=True)
    rounds = [texts, texts, together]
    jobs["wide"] = dict(folder=str(folder), options=wide, rounds=rounds, fewest=64)
    for dtype in LOW_PRECISION:
        low = dict(num_gpu_blocks_override=2000, dtype=dtype, **options)
        jobs[dtype] = dict(folder=str(folder), rounds=[texts], options=low)
    jobs["ranks"] = dict(folder=str(folder), options=options | ranks, rounds=[texts, texts])
    for seed, (name, pattern) in enumerate(PATTERNS.items()):
        for tp, pages in ((1, 80), (2, 60)):
            jobs[f"{name}-TP{tp}"] = dict(pattern=pattern.key, ranks=tp, pages=pages,
                                          seed=seed, steps=2000)  # fmt: skip
    for dtype in COMPILED_FOR if STUB is None else ():
        jobs[f"{dtype}-ahead"] = dict(ahead=True, dtype=dtype)
        jobs[f"{dtype}-late"] = dict(ahead=False, dtype=dtype)
    served = serve(list(jobs.values()), tmp_path_factory.mktemp("served"))
    return dict(zip(jobs, served, strict=True))


@pytest.fixture(scope="module")
def expected(folder, prompts, reports):
    return chosen_tokens(folder, prompts, reports["roomy"]["rounds"][0]["tokens"])


def test_the_folder_alone_says_all(reports):
    for name in ("roomy", "tight"):
        assert reports[name]["model"] == "S2LlamaForCausalLM" and reports[name]["block_size"] == 16


def test_chunked_prefill_and_requests_of_many_lengths(reports, expected):
    assert reports["roomy"]["rounds"][0]["tokens"] == expected
    assert all(len(tokens) == NEW for tokens in expected)


def test_long_chunks_go_through_the_training_kernels(reports, expected):
    """On a GPU; here through their definition, by the same lengths and tables."""
    assert [one["tokens"] for one in reports["wide"]["rounds"][:2]] == [expected, expected]
    chunks = {(new, in_all) for new, in_all in reports["wide"]["chunks"]}
    assert chunks and all(64 <= new <= in_all for new, in_all in chunks)
    assert any(new < in_all for new, in_all in chunks)  # behind tokens that are in pages
    assert reports["roomy"]["chunks"] == []  # 48 tokens a step


def test_a_second_round_comes_out_of_the_prefix_cache(reports, expected, prompts):
    again = reports["roomy"]["rounds"][1]
    assert again["tokens"] == expected
    assert again["cached"] == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def test_blocks_of_the_same_step_come_out_of_the_prefix_cache(reports, folder, prompts):
    """vLLM finds them before they are written, and orders their request behind the others."""
    together = reports["wide"]["rounds"][2]
    assert together["cached"] == [0, 64, 48]
    assert together["tokens"] == chosen_tokens(folder, twins(prompts), together["tokens"])


def test_cancelled_requests_leave_the_others_alone(reports, expected):
    cancelled, after = reports["roomy"]["rounds"][2:]
    assert cancelled["tokens"] == [None, expected[1], None, None, expected[4], None]
    assert after["tokens"] == expected


def test_preempted_requests_are_computed_again(reports, folder, short):
    growing = reports["tight"]["rounds"][1]
    assert growing["preemptions"] > 0
    assert growing["tokens"] == chosen_tokens(folder, short, growing["tokens"])
    assert all(len(tokens) == GROWN for tokens in growing["tokens"])


def test_a_pool_with_no_room_for_one_dense_text(reports, expected):
    report = reports["tight"]
    longest = 401 + NEW
    assert report["pages"] * max(report["layers_of_groups"]) < 4 * 4 * (longest // 16)
    assert [report["rounds"][i]["tokens"] for i in (0, 2)] == [expected, expected]


def test_ranks_whose_heads_differ_share_page_tables(reports, expected):
    """Shards of stride 4 on two ranks of two KV heads each: what is held is what either keeps."""
    assert [one["tokens"] for one in reports["ranks"]["rounds"]] == [expected, expected]
    assert reports["ranks"]["rounds"][1]["cached"] == reports["roomy"]["rounds"][1]["cached"]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_chooses_tokens_that_are_as_good(dtype, reports, folder, prompts):
    """As far as float32 says: with errors up to twice those of transformers in that precision."""
    tokens = reports[dtype]["rounds"][0]["tokens"]
    assert [len(new) for new in tokens] == [NEW] * len(prompts)
    short, error, spread = shortfall(folder, prompts, tokens, dtype)
    assert short <= 4 * error < spread / 3  # two logits are compared, each with its error


def test_cuda_graphs_hold_what_a_step_needs(reports):
    """Full ones of steps that only decode, piecewise ones of all others; see vllm_graphs.py."""
    graphs = reports["roomy"]["graphs"]
    assert graphs["support"] == "UNIFORM_SINGLE_TOKEN_DECODE"
    assert set(graphs["modes"].values()) == {"FULL_AND_PIECEWISE"}
    assert all(graphs["replayed"]) and graphs["pools"] == [1, 1, 1, 1]


def test_every_layer_is_ready_before_requests_come(reports):
    """By the step without requests that a GPU's worker ends its start with."""
    assert reports["roomy"]["ready"] == [[4], [4], [4], [4]]


@pytest.mark.skipif(STUB is not None, reason=str(STUB))
@pytest.mark.parametrize("dtype", COMPILED_FOR)
def test_nothing_is_compiled_while_requests_wait(reports, dtype):
    """145 steps, from one token to chunks of 8,192, alone and beside others that decode."""
    ahead, late = (reports[f"{dtype}-{name}"] for name in ("ahead", "late"))
    assert ahead["after"] == []
    assert Counter(ahead["ahead"]) == Counter(late["after"])  # and nothing that no step needs
    hopper = {"s2_hopper_forward_kernel", "s2_hopper_decode_kernel"}
    attends = {"s2_forward_kernel"} if dtype == "float32" else hopper
    assert {"s2_write_kernel", "s2_decode_kernel", "s2_merge_kernel"} | attends == set(
        late["after"]
    )


def test_no_page_is_lost(reports):
    for name in ("roomy", "tight", "ranks", "wide"):
        for one in reports[name]["rounds"]:
            assert one["free_before"] == one["free_after"] == reports[name]["pages"] - 1


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_random_requests_hold_what_is_alive_and_nothing_else(reports, name, tp):
    """vLLM's manager, hundreds of steps: prefix hits, chunks, preemption; see vllm_traffic.py."""
    assert all(count > 0 for count in reports[f"{name}-TP{tp}"].values())
