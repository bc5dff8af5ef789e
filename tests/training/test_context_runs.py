"""Context parallelism in Megatron's real loop on the CPU: the losses of one rank, step by step.

All runs start from one checkpoint and train the same batches in float32. The ends of documents are
masked, so that the tokens which count lie unevenly on the ranks. Layer 1 is dense.
"""

import pytest
from launches import assert_same, losses, train_on, write_weights

from s2megatron.data import write_dataset

CP2 = ["megatron.context_parallel_size=2"]
FULL = ["megatron.recompute_granularity=full", "megatron.recompute_method=uniform",
        "megatron.recompute_num_layers=1"]  # fmt: skip
RUNS = {
    "cp2_full_recompute": (2, [*CP2, *FULL]),
    "cp4": (4, ["megatron.context_parallel_size=4"]),
    "cp2_tp2_sp_selective_recompute": (
        4, [*CP2, "megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true",
            "megatron.recompute_granularity=selective", "megatron.recompute_modules=[core_attn]"]
    ),
    "cp2_pp2_vpp2_full_recompute": (
        4, [*CP2, *FULL, "megatron.pipeline_model_parallel_size=2",
            "megatron.num_layers_per_virtual_pipeline_stage=1"]
    ),
    "cp2_dp2_distributed_optimizer": (4, [*CP2, "megatron.use_distributed_optimizer=true"]),
}  # fmt: skip
SPREAD = "cp2_dp2_distributed_optimizer"
SAVE = ["megatron.save_interval=10", "megatron.use_distributed_optimizer=true"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus of short documents, a run file, and a checkpoint of weights."""
    folder = tmp_path_factory.mktemp("context")
    texts = [bytes(range(65, 70 + i % 23)).decode() * (1 + i % 5) for i in range(400)]
    write_dataset(iter(texts), str(folder / "corpus"))
    write_weights(folder, str(folder / "corpus"), eod_mask_loss=True)
    return folder


@pytest.fixture(scope="module")
def one_rank(home):
    return train_on(home, "one", *SAVE, f"megatron.save={home / 'one-ck'}", ranks=1)


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_one_rank(home, one_rank, name):
    ranks, options = RUNS[name]
    if name == SPREAD:
        options = [*options, *SAVE, f"megatron.save={home / 'spread-ck'}"]
    assert_same(train_on(home, name, *options, ranks=ranks), one_rank)


@pytest.mark.parametrize(("saved_by", "ranks"), [("spread", 1), ("one", 2)])
def test_a_checkpoint_resumes_at_another_context_parallel_size(home, one_rank, saved_by, ranks):
    """The distributed optimizer's: CP 2 x DP 2 at CP 1, and CP 1 at CP 2."""
    if not (home / f"{saved_by}-ck").exists():
        test_losses_of_one_rank(home, one_rank, SPREAD)
    got = losses(
        home / "run.yaml",
        home / f"{saved_by}-resumed",
        f"megatron.load={home / saved_by}-ck",
        "megatron.ckpt_step=10",
        "megatron.use_distributed_optimizer=true",
        f"megatron.context_parallel_size={ranks}",
        ranks=ranks,
    )
    assert_same(got, one_rank, first=11)


BUCKETS = ["megatron.use_distributed_optimizer=true", "megatron.save_interval=2",
           "megatron.dist_ckpt_optim_fully_reshardable=false",
           "megatron.overlap_grad_reduce=true", "megatron.ddp_bucket_size=20000"]  # fmt: skip
"""Of 172,608 parameters: several buckets."""


@pytest.fixture(scope="module")
def by_bucket(home):
    """Checkpoints of step 2 at CP 1 and CP 2, with the optimizer's state by bucket."""
    for ranks in (1, 2):
        save = [f"megatron.save={home / f'bucket-{ranks}'}", "megatron.exit_interval=2"]
        split = f"megatron.context_parallel_size={ranks}"
        train_on(home, f"bucket-{ranks}-saved", *BUCKETS, *save, split, ranks=ranks)


@pytest.mark.parametrize(
    ("saved", "ranks", "cp"),
    [(1, 2, 2), (2, 1, 1), (2, 2, 1)],
    ids=["CP1 to CP2", "CP2 to CP1", "CP2 to DP2"],
)
def test_optimizer_state_by_bucket_resumes_at_another_size(home, one_rank, by_bucket, saved, ranks,
                                                           cp):  # fmt: skip
    """A bucket is cut among the ranks of DP x CP, as it is among those of DP alone."""
    got = losses(
        home / "run.yaml",
        home / f"bucket-{saved}-{ranks}-{cp}",
        f"megatron.load={home / f'bucket-{saved}'}",
        "megatron.exit_interval=4",
        f"megatron.context_parallel_size={cp}",
        *BUCKETS,
        ranks=ranks,
    )
    assert got == pytest.approx({step: one_rank[step] for step in (3, 4)}, abs=1e-4)


def test_losses_per_token_of_one_rank(home, one_rank):
    """calculate_per_token_loss: Megatron divides by the tokens of all ranks and micro-batches."""
    options = ["megatron.calculate_per_token_loss=true", "megatron.exit_interval=5"]
    one = train_on(home, "tokens-one", *options, ranks=1)
    two = train_on(home, "tokens-cp2", *options, *CP2, ranks=2)
    assert sorted(two) == [1, 2, 3, 4, 5]
    assert two == pytest.approx(one, abs=1e-4)
    mean = {step: one_rank[step] for step in one}
    assert one != pytest.approx(mean, abs=1e-4)  # these micro-batches do differ in tokens


def test_experts_spread_over_context_parallel_ranks(home):
    """From one rank's weights: Megatron draws those of experts by expert-parallel rank."""
    options = [
        "megatron.num_experts=4",
        "megatron.moe_router_topk=2",
        "megatron.moe_ffn_hidden_size=32",
        "megatron.moe_router_load_balancing_type=aux_loss",
        "megatron.moe_aux_loss_coeff=0.01",
        "megatron.lr_decay_iters=20",
    ]
    save = ["megatron.train_iters=1", "megatron.save_interval=1", f"megatron.save={home / 'moe'}"]
    losses(home / "run.yaml", home / "moe0", *options, *save)
    options += ["megatron.train_iters=4", f"megatron.load={home / 'moe'}"]
    one = train_on(home, "moe1", *options, ranks=1)
    two = train_on(home, "moe2", *options, *CP2, "megatron.expert_model_parallel_size=2", ranks=2)
    assert len(one) == 4
    assert max(abs(one[step] - two[step]) for step in one) < 1e-4
