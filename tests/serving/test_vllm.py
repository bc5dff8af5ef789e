"""vLLM on the CPU serves tiny S2 models: tokens as transformers gives them, and no page is lost."""

import pytest
from vllm_cases import environment, expected_tokens, make_folder, random_tokens, serve

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    environment(tmp_path_factory.mktemp("skipped"))
    return make_folder("llama", tmp_path_factory.mktemp("llama"), SPARSITY, **HEADS)


@pytest.fixture(scope="module")
def prompts():
    shared, other, long, short = random_tokens(300, 37, 401, 7)
    return [shared, shared[:250] + other, long, short, long[:77], other]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    return expected_tokens(folder, prompts, NEW)


@pytest.fixture(scope="module")
def short(prompts):
    """Admitted together, because what they will grow to is not known."""
    return [prompts[0][:50], *prompts[3:]]


GROWN = 170


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
    served = serve(
        [
            dict(folder=str(folder), rounds=rounds,
                 options=dict(num_gpu_blocks_override=pages, **options))
            for pages, rounds in jobs.values()
        ],
        tmp_path_factory.mktemp("served"),
    )  # fmt: skip
    return dict(zip(jobs, served, strict=True))


def test_the_folder_alone_says_all(reports):
    for report in reports.values():
        assert report["model"] == "S2LlamaForCausalLM" and report["block_size"] == 16


def test_chunked_prefill_and_requests_of_many_lengths(reports, expected):
    assert reports["roomy"]["rounds"][0]["tokens"] == expected


def test_a_second_round_comes_out_of_the_prefix_cache(reports, expected, prompts):
    again = reports["roomy"]["rounds"][1]
    assert again["tokens"] == expected
    assert again["cached"] == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def test_cancelled_requests_leave_the_others_alone(reports, expected):
    cancelled, after = reports["roomy"]["rounds"][2:]
    assert cancelled["tokens"] == [None, expected[1], None, None, expected[4], None]
    assert after["tokens"] == expected


def test_preempted_requests_are_computed_again(reports, folder, short):
    growing = reports["tight"]["rounds"][1]
    assert growing["preemptions"] > 0
    assert growing["tokens"] == expected_tokens(folder, short, GROWN)


def test_a_pool_with_no_room_for_one_dense_text(reports, expected):
    report = reports["tight"]
    longest = 401 + NEW
    assert report["pages"] * max(report["layers_of_groups"]) < 4 * 4 * (longest // 16)
    assert [report["rounds"][i]["tokens"] for i in (0, 2)] == [expected, expected]


def test_no_page_is_lost(reports):
    for report in reports.values():
        for one in report["rounds"]:
            assert one["free_before"] == one["free_after"] == report["pages"] - 1
