"""What may differ between a checkpoint's options and the run's, and what a difference does.

A checkpoint holds the options that it was trained with. Some must stay, because the weights have
their shape. Some must stay unless the run file says what is to become of the learning-rate
schedule. Some only change what comes next, which is told. All others (the number of GPUs,
intervals, paths, logging) may change without a word. docs/launch.md has the same table for users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2megatron.data.tokenizers import SIZED_BY_OPTION

Facts = dict[str, Any]
"""Values by the name that a run file gives them."""


@dataclass(frozen=True)
class Change:
    """One option that differs."""

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.saved!r} in the checkpoint, {self.now!r} now"


def _plain(*names: str) -> Callable[[Any], Facts]:
    return lambda args: {f"megatron.{n}": getattr(args, n) for n in names if hasattr(args, n)}


def _shape(args) -> Facts:
    """What decides which weights there are, and how large."""
    facts = _plain(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "normalization",
        "swiglu",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "untie_embeddings_and_output_weights",
        "num_experts",
        "attention_output_gate",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_router_enable_expert_bias",
    )(args)
    if getattr(args, "num_experts", None) and hasattr(args, "moe_layer_freq"):
        facts["megatron.moe_layer_freq"] = _expert_layers(args.moe_layer_freq, args.num_layers)
    if hasattr(args, "num_query_groups"):
        grouped = getattr(args, "group_query_attention", False)
        groups = args.num_query_groups if grouped else args.num_attention_heads
        facts["megatron.num_query_groups"] = groups
    if hasattr(args, "position_embedding_type"):
        table = args.position_embedding_type == "learned_absolute"
        facts["a table of positions (megatron.position_embedding_type)"] = table
    return facts


def _expert_layers(frequency: int | list[int], layers: int) -> list[int]:
    """1 for each layer of experts, 0 for a dense one: what a number or a list comes to."""
    if isinstance(frequency, list):
        return frequency
    return [int(layer % frequency == 0) for layer in range(layers)]


NOT_IN_SCHEDULER = (
    "lr_warmup_init",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "lr_wsd_decay_style",
)
"""Of the schedule: not in the scheduler's own state, so taken from the checkpoint's options."""


def _batch(args) -> tuple[str, ...]:
    """Nothing where the batch grows: global_batch_size is micro_batch_size x DP there."""
    return () if getattr(args, "step_batch_size_schedule", None) else ("global_batch_size",)


def _schedule(args) -> Facts:
    """What the learning-rate and weight-decay schedules are made of; counted in samples."""
    by_samples = getattr(args, "train_samples", None) is not None
    length = ("train_samples",) if by_samples else ("train_iters", *_batch(args))
    facts = _plain(
        "lr",
        "min_lr",
        *length,
        "lr_decay_style",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_warmup_fraction",
        *NOT_IN_SCHEDULER,
        "step_batch_size_schedule",
        "start_weight_decay",
        "end_weight_decay",
        "weight_decay_incr_style",
    )(args)
    decay, whole = ("lr_decay_samples", "train_samples") if by_samples else (
        "lr_decay_iters", "train_iters")  # fmt: skip
    if hasattr(args, decay):
        # Megatron fills it in from the length of the run, which is compared already.
        own = getattr(args, decay)
        facts[f"megatron.{decay}"] = None if own == getattr(args, whole) else own
    if getattr(args, "decoupled_lr", None) is not None:
        facts |= _plain("decoupled_lr", "decoupled_min_lr")(args)
    return facts


def _optimizer(args) -> Facts:
    """What decides which state an optimizer keeps."""
    facts = _plain("optimizer", "bf16", "fp16", "use_distributed_optimizer")(args)
    if hasattr(args, "decoupled_lr"):
        own = args.decoupled_lr is not None
        facts["parameter groups of their own for embeddings (megatron.decoupled_lr)"] = own
    return facts


MODEL = "the same weights make another model"
_SAYS: dict[str, str] = {
    "from here on the samples come in another order; some may come again, some never": "seed "
    "dataloader_type data_sharding",
    "samples are cut anew, so some text may come again, some never; the loss is the mean over "
    "other lengths": "seq_length",
    "rows beyond the vocabulary count in the softmax: the loss steps": "padded_vocab_size",
    "token ids may mean other tokens": "vocab_size tokenizer_type tokenizer_model",
    MODEL: "position_embedding_type rotary_base rotary_percent "
    "rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor "
    "rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings "
    "yarn_beta_fast yarn_beta_slow no_rope_freq layernorm_epsilon layernorm_zero_centered_gamma "
    "qk_l2_norm squared_relu quick_geglu glu_linear_offset activation_func_clamp_value "
    "moe_router_load_balancing_type moe_router_topk moe_router_num_groups moe_router_group_topk "
    "moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor "
    "moe_apply_probs_on_input moe_expert_capacity_factor moe_token_drop_policy",
    "other data from here on": "mock_data data_path train_data_path data_args_path "
    "per_split_data_args_path split",
    "from here on tokens see other tokens, or other positions": "reset_position_ids "
    "dataloader_inter_document_masking",
    "the loss is the mean over other tokens": "eod_mask_loss",
    "other tokens a step; the samples go on from where they were": "global_batch_size",
    "the run has another length": "train_samples",
    "other numbers are dropped in training": "hidden_dropout",
    "gradients are clipped at another norm": "clip_grad",
    "the optimizer's state keeps the checkpoint's value": "adam_beta1 adam_beta2 adam_eps",
}
TOLD: dict[str, str] = {name: says for says, names in _SAYS.items() for name in names.split()}
"""Options that are told when they differ, and what the difference does."""


def _differences(facts: Callable[[Any], Facts], saved, now) -> list[Change]:
    """What both know and do not agree in."""
    before, after = facts(saved), facts(now)
    return [
        Change(name, before[name], after[name])
        for name in after
        if name in before and before[name] != after[name]
    ]


def _told(saved, now, *names: str) -> list[str]:
    changes = _differences(_plain(*names), saved, now)
    return [f"{change}: {TOLD[change.name.removeprefix('megatron.')]}" for change in changes]


@dataclass(frozen=True)
class Comparison:
    """What the checkpoint and the run do not agree in."""

    shape: list[Change]
    optimizer: list[Change]
    schedule: list[Change]
    told: list[str]
    """A line for each option that only changes what comes next."""


def compare(saved, now, *, optimizer: bool) -> Comparison:
    """A checkpoint's options against the run's.

    Args:
        saved, now: Megatron's arguments, the checkpoint's and the run's.
        optimizer: the optimizer's state and the schedule are loaded too; without them (finetune,
            no_load_optim) only weights are: told is what makes another model of these.
    """
    shape = _differences(_shape, saved, now)
    if not optimizer:
        return Comparison(shape, [], [], _told(saved, now, *_SAYS[MODEL].split()))
    schedule = _differences(_schedule, saved, now)
    seen = {change.name for change in schedule}
    if not (_batch(saved) and _batch(now)):
        seen.add("megatron.global_batch_size")
    if getattr(now, "tokenizer_type", None) not in (None, *SIZED_BY_OPTION):
        # Nobody reads it then; checkpoints from before 2026-11-28 may have one.
        seen.add("megatron.vocab_size")
    told = _told(saved, now, *(name for name in TOLD if f"megatron.{name}" not in seen))
    told += [
        f"dataset {prefix}: was made anew, other documents from here on"
        for prefix, digest in getattr(now, "s2_data", {}).items()
        if getattr(saved, "s2_data", {}).get(prefix, digest) != digest
    ]
    told += _other_lists(saved, now)
    return Comparison(shape, _differences(_optimizer, saved, now), schedule, told)


def _other_lists(saved, now) -> list[str]:
    """A line where the file that names the datasets is the same, and names others."""
    for name in ("data_args_path", "per_split_data_args_path"):
        file = getattr(now, name, None)
        before, after = set(getattr(saved, "s2_data", ())), set(getattr(now, "s2_data", ()))
        if file and file == getattr(saved, name, None) and before and before != after:
            changed = ", ".join(sorted(before ^ after))
            return [f"megatron.{name}: {file} names other datasets ({changed}) from here on"]
    return []


def refusal(comparison: Comparison, folder, now) -> str:
    """'' where the run may go on, else what stands in its way and the ways out."""
    lines = []
    if comparison.shape:
        lines += _list(f"checkpoint {folder} holds another model than configured", comparison.shape)
        lines.append("Restore these options; a model of another shape is a run of its own")
    if comparison.optimizer:
        lines += _list(f"checkpoint {folder} holds another optimizer's state", comparison.optimizer)
        lines.append(
            "Restore these options, or start a new run from these weights: an output.folder of its "
            f"own, megatron.load={folder.parent} and megatron.finetune=true"
        )
    if comparison.schedule and not (
        now.override_opt_param_scheduler or now.use_checkpoint_opt_param_scheduler
    ):
        lines += _list(f"checkpoint {folder} has another schedule", comparison.schedule)
        lines.append(
            "Restore these options, or go on with the new ones: "
            "megatron.override_opt_param_scheduler=true"
        )
    return "\n".join(lines)


def _list(title: str, changes: list[Change]) -> list[str]:
    return [f"{title}:", *(f"  {change}" for change in changes)]
