"""Megatron's real loop on the CPU: every layout gives the same losses, and a resumed run goes on.

All runs start from one checkpoint (initial weights depend on the layout in Megatron), train the
same batches in float32, and are compared step by step.
"""

import pytest
from agents import make_corpus
from launches import assert_same, losses, start, train_on, write_weights

STEPS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus, a run file, and a checkpoint of initial weights."""
    folder = tmp_path_factory.mktemp("training")
    write_weights(folder, make_corpus(folder))
    return folder


@pytest.fixture(scope="module")
def one_rank(home):
    return train_on(home, "one", f"megatron.save={home / 'one-ck'}", "megatron.save_interval=10",
                 ranks=1)  # fmt: skip


LAYOUTS = {
    "tp2_sp": ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"],
    "pp2": ["megatron.pipeline_model_parallel_size=2"],
    "pp2_full_recompute": [
        "megatron.pipeline_model_parallel_size=2",
        "megatron.recompute_granularity=full",
        "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1",
    ],
    "dp2": [],
    "dp2_distributed_optimizer": ["megatron.use_distributed_optimizer=true"],
}


def test_one_rank_learns(one_rank):
    assert len(one_rank) == STEPS and one_rank[STEPS] < one_rank[1] - 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_losses_of_one_rank(home, one_rank, name):
    save = [f"megatron.save={home / name}-ck", "megatron.save_interval=10"]
    got = train_on(home, name, *LAYOUTS[name], *(save if name == "tp2_sp" else []), ranks=2)
    assert_same(got, one_rank)


@pytest.mark.parametrize("saved_by", ["one", "tp2_sp"])
def test_resumed_run_goes_on_as_if_never_stopped(home, one_rank, saved_by):
    """From step 10 of one rank, and across TP=2 -> TP=1."""
    if not (home / f"{saved_by}-ck").exists():
        test_layout_gives_the_losses_of_one_rank(home, one_rank, saved_by)
    got = losses(
        home / "run.yaml",
        home / f"{saved_by}-resumed",
        f"megatron.load={home / saved_by}-ck",
        "megatron.ckpt_step=10",
    )
    assert_same(got, one_rank, first=11)


def test_fewer_kv_heads_than_ranks(home):
    """Two ranks share the one KV head; its pattern must come from the model, not from the rank."""
    options = [
        "megatron.num_query_groups=1",
        "megatron.use_cpu_initialization=true",  # the same weights for any TP
        "megatron.train_iters=5",
        "megatron.lr_decay_iters=20",
    ]
    one = losses(home / "run.yaml", home / "mqa1", *options)
    two = losses(home / "run.yaml", home / "mqa2", *options, *LAYOUTS["tp2_sp"], ranks=2)
    assert max(abs(one[step] - two[step]) for step in range(1, 6)) < 1e-4


def test_sparse_is_not_dense_and_infinite_lifetimes_are(home, one_rank):
    """The same weights and data: stride 1 gives dense attention's losses, real sparsity others."""
    three = ["megatron.train_iters=3", "megatron.lr_decay_iters=20"]
    whole = ["sparsity.default.stride=1", "sparsity.on_resume=replace"]
    dense = ["sparsity.default={kind: dense}", "sparsity.on_resume=replace"]
    stride_1 = train_on(home, "stride1", *three, *whole, ranks=1)
    all_dense = train_on(home, "dense", *three, *dense, ranks=1)
    for step in (1, 2, 3):
        assert stride_1[step] == pytest.approx(all_dense[step], abs=1e-5)
    assert abs(one_rank[1] - all_dense[1]) > 1e-3


def test_checkpoint_of_another_sparsity_is_refused(home, one_rank):
    load = f"megatron.load={home / 'one-ck'}"
    done = start(home / "run.yaml", load, "sparsity.default.stride=2")
    assert done.returncode != 0
    assert "another sparsity" in done.stderr and "layer 2" in done.stderr
    assert "1/4" in done.stderr and "1/2" in done.stderr
    assert "sparsity.on_resume=replace" in done.stderr


def test_own_throughput_line_stands_beside_megatrons(home):
    done = start(home / "run.yaml", "megatron.train_iters=4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "throughput per GPU (TFLOP/s/GPU)" in done.stdout
    assert "tokens/s |" in done.stdout and "true model TFLOP/s/rank" in done.stdout
    assert "S2CoreAttention" in done.stdout and "TorchDenseAttention" in done.stdout
