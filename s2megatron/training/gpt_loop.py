"""What Megatron's training loop asks of a GPT launcher: batches, loss, forward step, datasets.

megatron-core's wheel brings `pretrain()` but not pretrain_gpt.py. This module takes its place.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from s2megatron.training.data_identity import KnownDataConfig, KnownGPTDataset, data_identity
from s2megatron.training.packing import document_ends, flatten_samples, packed_seq_params
from s2megatron.training.throughput import ThroughputMeter

SPIKE = 10.0
"""A loss this many times the largest one seen is spiky (--check-for-spiky-loss; Megatron's own)."""

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(
    data_iterator, vp_stage: int | None, micro_batch_size: int
) -> dict[str, torch.Tensor | None]:
    """One micro-batch, each [b, s]; read by tensor-parallel rank 0 and broadcast to the others.

    b is the `micro_batch_size`; an evaluation may have another one than training.

    Under context parallelism every rank reads the whole sequences and keeps its own chunks of them.
    With inter-document masking each is [1, b * s], and "documents" holds int32 [documents + 1] on
    the host: where each document starts and the last one ends. Every pipeline stage needs them.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    outer = is_first_or_last_pipeline_stage(vp_stage)
    if not outer and not packed:
        return dict.fromkeys((*BATCH_KEYS, "documents"))
    batch, cu_seqlens = {}, None
    keys = (*BATCH_KEYS, "cu_seqlens", "max_seqlen") if packed else BATCH_KEYS
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        cu_seqlens = data.get("cu_seqlens")
        batch = {
            key: data[key].cuda(non_blocking=True) if data.get(key) is not None else None
            for key in keys
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    samples = {key: batch.get(key) if outer else None for key in BATCH_KEYS}
    if not packed:
        group = mpu.get_context_parallel_group()
        samples = get_batch_on_this_cp_rank(samples, is_hybrid_cp=False, cp_group=group)
        return samples | {"documents": None}
    if cu_seqlens is None:  # the one wait for the GPU in a micro-batch
        cu_seqlens = batch["cu_seqlens"].cpu()
    return flatten_samples(samples) | {"documents": document_ends(cu_seqlens, args.seq_length)}


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor):
    """Sum of the token losses, the number of tokens, and what Megatron logs of them.

    Megatron divides the first by the second, and adds up the gradients of the context-parallel
    ranks as a mean. For the gradient of the whole sequence's mean loss, whose tokens may lie
    unevenly on the ranks (masked ends of documents), the sum is scaled by their number and the
    tokens are those of all. With calculate_per_token_loss Megatron does that itself.
    """
    losses, mask = output.view(-1).float(), loss_mask.view(-1).float()
    loss = (losses * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    args, machine = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        checks += [(spiky, "Spiky loss", False)]
    for rejected, message, fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejected, message=message, tolerance=0.0, fatal=fatal
        )
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    ranks = args.context_parallel_size
    if ranks > 1 and not args.calculate_per_token_loss:
        loss, num_tokens = loss * ranks, num_tokens.clone()
        torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
    return loss, num_tokens, report


def make_forward_step(meter: ThroughputMeter, each_iteration: Callable[[int], None] | None = None):
    """The forward step of Megatron's schedules; it tells the meter when it is called.

    Args:
        each_iteration: called with the number of finished iterations before each micro-batch.
    """

    def forward_step(data_iterator, model):
        args, timers = get_args(), get_timers()
        if model.training:
            micro_batch_size = args.micro_batch_size
            meter.training(args.curr_iteration)
            if each_iteration:
                each_iteration(args.curr_iteration)
        else:
            micro_batch_size = args.eval_micro_batch_size
            meter.evaluating()
        timers("batch-generator", log_level=2).start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage, micro_batch_size)
        packing = None
        if batch["documents"] is not None:
            packing = packed_seq_params(
                batch["documents"],
                tokens_per_sample=args.seq_length,
                host_rope=args.transformer_impl == "local" and not args.apply_rope_fusion,
            )
            if not vp_stage:  # the other virtual stages see the same documents again
                update_seqlen_stats_from_cu_seqlens(packing.cu_seqlens_q)
                if model.training:
                    meter.documents(batch["documents"].diff())
        timers("batch-generator").stop()
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packing,
        )
        return output, partial(loss_func, batch["loss_mask"])

    return forward_step


def dataset_config(args) -> KnownDataConfig:
    """Megatron's dataset configuration from its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    return KnownDataConfig(
        documents=data_identity(args),
        rows=args.padded_vocab_size,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        sequences_per_dataset=sequences and json.loads(Path(sequences).read_text()),
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def _is_built_here(vp_stage: int | None = None) -> bool:
    args = get_args()
    # Every stage asks where documents end, and how many samples the whole of a validation set has.
    needed = args.dataloader_inter_document_masking or args.full_validation
    needed = needed or is_first_or_last_pipeline_stage(vp_stage)
    return mpu.get_tensor_model_parallel_rank() == 0 and needed


def datasets_provider(num_samples, vp_stage: int | None = None):
    """Train, validation and test datasets; `num_samples` of each."""
    args = get_args()
    kind = MockGPTDataset if args.mock_data else KnownGPTDataset
    print_rank_0("> building train, validation, and test datasets ...")
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, partial(_is_built_here, vp_stage=vp_stage), dataset_config(args)
    ).build()


datasets_provider.is_distributed = True  # every rank may call it
