"""What is set for the user and what is refused, before weights are loaded.

vLLM calls `check_and_set` with the whole configuration in the process that the user started.
"""

import logging

import vllm
import vllm.platforms

from s2_kernels.api import TRITON_HEAD_SIZES
from s2_kernels.cache import alive_pages
from s2_kernels.pattern import LayerPattern
from s2_kernels.record import ARCHITECTURE_PREFIX, read_record
from s2_kernels.versions import NO_TRITON
from s2_vllm.rules import held_share
from s2_vllm.versions import too_new, too_old

logger = logging.getLogger("vllm.s2")  # below vLLM's own, which has a handler

ARCHITECTURES = {
    "LlamaForCausalLM": "vllm.model_executor.models.llama",
    "MistralForCausalLM": "vllm.model_executor.models.mistral",
    "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2",
    "Qwen3ForCausalLM": "vllm.model_executor.models.qwen3",
    "MixtralForCausalLM": "vllm.model_executor.models.mixtral",
    "Qwen3MoeForCausalLM": "vllm.model_executor.models.qwen3_moe",
}
"""What `s2megatron convert to-hf` writes, and where vLLM has it."""

OURS = ARCHITECTURE_PREFIX
"""What our classes' names begin with, and the `architectures` of the folders they are for."""


def check_and_set(config) -> None:
    """Makes vLLM serve a model with an `s2` key as it was trained; leaves other models alone.

    Args:
        config: a VllmConfig that is being made.

    Raises:
        ValueError: one line that names what does not fit, and the way out.
    """
    model = config.model_config
    record = getattr(model.hf_text_config, "s2", None)
    where = f"{model.model}/config.json"
    if record is None:
        return _refuse_lost_record(model.hf_config, where)
    if wrong := too_old(vllm.__version__):
        raise ValueError(f"{where} has an 's2' key, and {wrong}")
    (name,) = model.hf_config.architectures
    name = name.removeprefix(OURS)  # folders converted before there was the prefix lack it
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{where}: architectures: {name} with an 's2' key is not supported; one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    patterns = _read_patterns(record, model.hf_text_config, where)
    _check_kernels(vllm.platforms.current_platform, model.get_head_size(), where)
    _refuse_options(config, where)
    quantization = getattr(model.hf_config, "quantization_config", None)
    check_cache_dtype(config.cache_config.cache_dtype, model, quantization, where)
    _check_parallel(config.parallel_config, patterns[0])
    _set_block_size(config.cache_config, patterns[0].block_size, where)
    model.hf_config.architectures = [OURS + name]
    if doubt := too_new(vllm.__version__):
        logger.warning(doubt)
    _tell(model, config.parallel_config.tensor_parallel_size, patterns)


def _refuse_lost_record(hf, where: str) -> None:
    """Raises ValueError where only the class's name says that the model was trained with S2."""
    for name in hf.architectures or ():
        if name.startswith(OURS) and name.removeprefix(OURS) in ARCHITECTURES:
            raise ValueError(
                f"{where}: architectures: {name} without an 's2' key: nothing says which tokens "
                "are attended to; convert the checkpoint again (s2megatron convert to-hf)"
            )


def _read_patterns(record, hf, where: str) -> tuple[LayerPattern, ...]:
    """The patterns of all layers, checked against the model's sizes."""
    try:
        patterns = read_record(record)
    except ValueError as error:
        raise ValueError(f"{where}: s2: {error}") from None
    sizes = (hf.num_attention_heads, hf.num_key_value_heads)
    if len(patterns) != hf.num_hidden_layers:
        raise ValueError(
            f"{where}: s2 has patterns of {len(patterns)} layers, num_hidden_layers="
            f"{hf.num_hidden_layers}: convert the checkpoint again (s2megatron convert to-hf)"
        )
    for number, pattern in enumerate(patterns, 1):
        if (pattern.heads, pattern.kv_heads) != sizes:
            raise ValueError(
                f"{where}: the s2 pattern of layer {number} is for {pattern.heads} heads and "
                f"{pattern.kv_heads} KV heads, the model has {sizes[0]} and {sizes[1]}: convert "
                "the checkpoint again (s2megatron convert to-hf)"
            )
        if pattern.block_size != patterns[0].block_size:
            raise ValueError(
                f"{where}: s2: layer {number} has blocks of {pattern.block_size} tokens, layer 1 "
                f"of {patterns[0].block_size}: pages of one pool have one size; serve it with "
                "transformers (s2megatron.hf.load)"
            )
    return patterns


def _refuse_options(config, where: str) -> None:
    """Raises ValueError for what S2 pages have no place for, by the option's name."""
    from vllm import envs

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    hf = model.hf_text_config
    windowed = getattr(hf, "use_sliding_window", True)
    window = getattr(hf, "sliding_window", None) if windowed else None
    attention = config.attention_config
    backend = attention.backend
    experts = (model, getattr(config, "aux_output_config", None))  # in the first up to 0.32
    found = {
        f"{where}: sliding_window={window}": window is not None,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        f"--model-impl {model.model_impl}": model.model_impl not in ("auto", "vllm"),
        f"--attention-backend {getattr(backend, 'name', backend)}": backend is not None
        and backend.name != "CUSTOM",
        "--attention-config backend_per_kind": bool(getattr(attention, "backend_per_kind", None)),
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
        "--enable-return-routed-experts": any(
            getattr(part, "enable_return_routed_experts", False) for part in experts
        ),
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        "--disable-hybrid-kv-cache-manager": bool(
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--enable-dbo": parallel.enable_dbo,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
    }
    for name, refused in found.items():
        if refused:
            raise ValueError(
                f"{name}: not supported with the pages per KV head of an S2 model; leave it out "
                "(docs/serving.md says why)"
            )


def check_cache_dtype(cache_dtype: str, model, quantization, where: str) -> None:
    """Raises ValueError where pages would hold another type than the model computes in.

    Args:
        cache_dtype: of `--kv-cache-dtype`.
        quantization: of config.json. llm-compressor's may ask for an fp8 cache, which vLLM takes
            where the option is left at "auto".
    """
    dtype = str(model.dtype).removeprefix("torch.")
    scheme = None
    if cache_dtype == "auto" and isinstance(quantization, dict):
        scheme = quantization.get("kv_cache_scheme")
    if cache_dtype in ("auto", dtype) and scheme is None:
        return
    asks = f"--kv-cache-dtype {cache_dtype}"
    if scheme is not None:
        asks = f"{where}: quantization_config.kv_cache_scheme"
    low = dtype if dtype in ("bfloat16", "float16") else "bfloat16"
    raise ValueError(
        f"{asks}: not supported with the pages per KV head of an S2 model, which hold float16, "
        f"bfloat16 or float32, as the model computes; give --dtype {low} --kv-cache-dtype {low}"
    )


def _check_kernels(platform, head_size: int, where: str) -> None:
    """Raises ValueError where the kernels cannot run; on the CPU PyTorch computes, slowly."""
    if platform.is_cpu():
        return
    if not platform.is_cuda():
        raise ValueError(
            f"{where} has an 's2' key, and the S2 kernels run on NVIDIA GPUs and, to try things "
            f"out, on the CPU; this vLLM is for {platform.device_name}"
        )
    if NO_TRITON:
        raise ValueError(f"{where} has an 's2' key, and the S2 kernels need Triton: {NO_TRITON}")
    if head_size not in TRITON_HEAD_SIZES:
        raise ValueError(
            f"{where}: head_dim={head_size}: the S2 kernels take {TRITON_HEAD_SIZES[0]} to "
            f"{TRITON_HEAD_SIZES[-1]} in multiples of 16; serve it with transformers "
            "(s2megatron.hf.load)"
        )


def _check_parallel(parallel, pattern: LayerPattern) -> None:
    """Raises ValueError where heads do not divide over the tensor-parallel ranks."""
    size = parallel.tensor_parallel_size
    works = [n for n in range(1, pattern.heads + 1) if _splits(pattern, n)]
    if size not in works:
        raise ValueError(
            f"--tensor-parallel-size {size}: {pattern.heads} heads and {pattern.kv_heads} KV heads "
            f"cannot be split over it; sizes that work: {', '.join(map(str, works))}"
        )


def _splits(pattern: LayerPattern, ranks: int) -> bool:
    kv_heads = pattern.kv_heads
    return pattern.heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _set_block_size(cache, block_size: int, where: str) -> None:
    """A page holds one block of the pattern."""
    if cache.user_specified_block_size and cache.block_size != block_size:
        raise ValueError(
            f"--block-size {cache.block_size}: a page holds one block of the model's pattern, "
            f"{block_size} tokens as {where} says; leave it out, or give --block-size {block_size}"
        )
    cache.block_size = block_size
    cache.user_specified_block_size = True  # or the platform would choose another one


def _tell(model, ranks: int, patterns: tuple[LayerPattern, ...]) -> None:
    """One line on what is saved, and one where tensor parallelism saves less than it could."""
    tokens, size = model.max_model_len, patterns[0].block_size
    pages = sum(alive_pages(pattern, tokens) for pattern in patterns)
    full = sum(pattern.kv_heads for pattern in patterns) * -(-tokens // size)
    dense = sum(rule.is_dense for pattern in patterns for rule in pattern.rules)
    logger.info(
        "S2 attention: a text of %d tokens keeps %d of %d pages of %d tokens (%.1f times less than "
        "dense); %d of %d KV heads are dense", tokens, pages, full, size, full / pages, dense,
        sum(pattern.kv_heads for pattern in patterns),
    )  # fmt: skip
    share = max(held_share(pattern, ranks, tokens) for pattern in set(patterns))
    if share > 1.05:
        logger.warning(
            "--tensor-parallel-size %d: the ranks' heads keep different blocks, and a page table "
            "serves all ranks: up to %.1f times the pages of a layer's own heads are held",
            ranks, share,
        )  # fmt: skip
