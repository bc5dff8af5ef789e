"""How a model is spread over GPUs: sizes of TP, CP, PP, DP, EP; the batch; what is recomputed."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from s2_kernels import LayerPattern
from s2megatron.accounting import ModelShape
from s2megatron.errors import ConfigError

BF16, FP32 = 2, 4
RING, GATHER, ULYSSES = "p2p", "all_gather", "a2a"
"""How Transformer Engine's dense layers run under context parallelism: Megatron's cp_comm_type."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    shape: ModelShape
    patterns: tuple[LayerPattern, ...]


def layer_kinds(model: Model, layers: Iterable[int]) -> list[tuple[int, int]]:
    """(a layer, how many of `layers` cost what it costs), by pattern and experts."""
    alike: dict[tuple, list[int]] = {}
    for layer in layers:
        alike.setdefault((model.patterns[layer], model.shape.moe_layers[layer]), []).append(layer)
    return [(same[0], len(same)) for same in alike.values()]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Megatron's order of ranks: TP innermost, then CP, then DP (EP is cut out of both), then PP.

    Under context parallelism (CP = c) the sequence is cut into 2c chunks; rank r holds chunks r and
    2c - 1 - r.
    """

    gpus: int
    tp: int = 1
    cp: int = 1
    cp_comm: str = RING
    """Of dense layers that are Transformer Engine's; all others exchange blocks."""
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule where more than 1)."""
    ep: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    global_batch: int = 1
    recompute: str = "none"
    """'none', 'core_attn' (selective), 'full' (uniform, every layer)."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    fused: bool = True
    """Transformer Engine's modules; else Megatron's local ones."""
    fused_accumulation: bool = False
    """Weight gradients are added within the matrix product (Apex)."""
    bf16: bool = True
    keep_attention_output: bool = True
    """Of sparse layers, under full recompute."""

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def copies(self) -> int:
        """Ranks that hold the same parameters: gradients are reduced over them."""
        return self.dp * self.cp

    @property
    def width(self) -> int:
        """Bytes of an activation or a weight."""
        return BF16 if self.bf16 else FP32

    def local_tokens(self, shape: ModelShape) -> float:
        """Tokens of a micro-batch on one CP rank."""
        return self.micro_batch * shape.seq_len / self.cp

    def exchanges_blocks(self, pattern: LayerPattern) -> bool:
        """Whether a layer's CP ranks exchange blocks by lifetimes; else `cp_comm` says how."""
        return not (pattern.is_dense and self.fused)

    @property
    def micro_batches(self) -> int:
        return self.global_batch // (self.micro_batch * self.dp)

    def misfit(self, model: Model) -> str:
        """'' where the model and the batch divide over the axes, else what does not."""
        shape = model.shape
        if self.gpus % (self.tp * self.cp * self.pp):
            sizes = f"TP {self.tp} x {f'CP {self.cp} x ' if self.cp > 1 else ''}PP {self.pp}"
            return f"{sizes} does not divide {self.gpus} GPUs"
        if shape.heads % self.tp or (shape.kv_heads % self.tp and self.tp % shape.kv_heads):
            return f"TP {self.tp} does not divide {shape.heads} heads ({shape.kv_heads} KV heads)"
        if shape.ffn % self.tp or shape.vocab % self.tp:
            return f"TP {self.tp} does not divide the MLP ({shape.ffn}) or the vocabulary"
        if shape.layers % (self.pp * self.vpp):
            return f"PP {self.pp} x VPP {self.vpp} does not divide {shape.layers} layers"
        if self.cp > 1 and (misfit := self._context_misfit(model)):
            return misfit
        if self.sequence_parallel and shape.seq_len % (self.tp * self.cp):
            each = f"{shape.seq_len} tokens" + (f" over CP {self.cp}" if self.cp > 1 else "")
            return f"TP {self.tp} does not divide {each}"
        if self.global_batch % (self.micro_batch * self.dp):
            return (
                f"global batch {self.global_batch} is not a multiple of micro-batch "
                f"{self.micro_batch} x DP {self.dp}"
            )
        if self.vpp > 1 and (self.pp == 1 or self.micro_batches % self.pp):
            return f"VPP needs PP > 1 and micro-batches ({self.micro_batches}) a multiple of it"
        if self.ep > 1 and (not shape.experts or shape.experts % self.ep or self.copies % self.ep):
            ranks = f"DP {self.dp}" + (f" x CP {self.cp}" if self.cp > 1 else "")
            return f"EP {self.ep} does not divide {shape.experts} experts and {ranks}"
        return ""

    def _context_misfit(self, model: Model) -> str:
        """What context parallelism asks of the sequence, and Ulysses of the heads."""
        shape, chunks = model.shape, 2 * self.cp
        if shape.seq_len % chunks:
            return f"CP {self.cp} cuts {shape.seq_len} tokens into {chunks} chunks, unevenly"
        chunk = shape.seq_len // chunks
        by_blocks = [pattern for pattern in model.patterns if self.exchanges_blocks(pattern)]
        for block in {pattern.block_size for pattern in by_blocks}:
            if chunk % block:
                return f"CP {self.cp} makes chunks of {chunk} tokens, not of whole blocks ({block})"
        dense = len(by_blocks) < len(model.patterns)
        heads, groups = shape.heads // self.tp, max(1, shape.kv_heads // self.tp)
        if dense and self.cp_comm == ULYSSES and (heads % self.cp or groups % self.cp):
            return (
                f"CP {self.cp} with cp_comm_type a2a does not divide the {heads} heads and "
                f"{groups} KV heads of a TP rank"
            )
        return ""

    def stages(self, layers: int) -> list[list[int]]:
        """Layers (0-based) of each pipeline stage; with VPP a stage holds several chunks."""
        return _stages(layers, self.pp, self.vpp)

    def __str__(self) -> str:
        parts = [f"TP {self.tp}{' + SP' if self.sequence_parallel else ''}", f"PP {self.pp}"]
        if self.vpp > 1:
            parts[-1] += f" x{self.vpp}"
        if self.cp > 1:
            parts.insert(1, f"CP {self.cp}")
        parts.append(f"DP {self.dp}")
        if self.ep > 1:
            parts.append(f"EP {self.ep}")
        attention = self.recompute == "full" and not self.keep_attention_output
        return (
            f"{', '.join(parts)}, recompute {self.recompute}{' + attention' if attention else ''}"
        )


@functools.lru_cache(maxsize=1024)
def _stages(layers: int, pp: int, vpp: int) -> list[list[int]]:
    """`Layout.stages`, which a search asks for the same few sizes many times."""
    per_chunk = layers // (pp * vpp)
    stages = []
    for stage in range(pp):
        firsts = [(chunk * pp + stage) * per_chunk for chunk in range(vpp)]
        stages.append([first + i for first in firsts for i in range(per_chunk)])
    return stages


def layout_of(args, gpus: int) -> Layout:
    """The layout of Megatron's arguments on so many GPUs. Raises ConfigError."""
    recompute = "none"
    if args.recompute_granularity == "full":
        if args.recompute_method != "uniform" or args.recompute_num_layers != 1:
            raise ConfigError(
                f"megatron.recompute_method={args.recompute_method}, recompute_num_layers="
                f"{args.recompute_num_layers}: the planner knows 'uniform' with 1 layer"
            )
        recompute = "full"
    elif args.recompute_granularity == "selective":
        modules = args.recompute_modules or ["core_attn"]
        if modules != ["core_attn"]:
            raise ConfigError(
                f"megatron.recompute_modules={modules}: the planner knows 'core_attn' only"
            )
        recompute = "core_attn"
    return Layout(
        gpus=gpus,
        tp=args.tensor_model_parallel_size,
        cp=args.context_parallel_size,
        cp_comm=_cp_comm(args),
        pp=args.pipeline_model_parallel_size,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        ep=args.expert_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        recompute=recompute,
        distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        fused=args.transformer_impl == "transformer_engine",
        fused_accumulation=args.gradient_accumulation_fusion,
        bf16=args.bf16 or args.fp16,
    )


def _cp_comm(args) -> str:
    """The one cp_comm_type of all layers. Raises ConfigError."""
    kinds = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
    if len(set(kinds)) > 1 or kinds[0] not in (RING, GATHER, ULYSSES):
        raise ConfigError(
            f"megatron.cp_comm_type={kinds}: the planner knows one of {RING}, {GATHER} and "
            f"{ULYSSES}, the same for all layers"
        )
    return kinds[0]


RECOMPUTE = (("none", True), ("core_attn", True), ("full", True), ("full", False))
"""What a search tries: recompute, and whether sparse layers keep attention's output under it."""


def candidates(
    base: Layout, model: Model, *, most_tp: int, most_cp: int | None = None
) -> list[Layout]:
    """Every layout of `base.gpus` GPUs that the model and the global batch divide over.

    Micro-batches are of one sequence (long sequences fill a GPU).

    Args:
        most_tp, most_cp: the largest tensor- and context-parallel size tried (CP: None, any).
    """
    return [
        layout
        for tp in _divisors(base.gpus)
        if tp <= most_tp
        for cp in _divisors(base.gpus // tp)
        if most_cp is None or cp <= most_cp
        for pp in _divisors(base.gpus // (tp * cp))
        for layout in _of_sizes(base, model, tp, cp, pp)
    ]


def _of_sizes(base: Layout, model: Model, tp: int, cp: int, pp: int) -> list[Layout]:
    """Candidates of these sizes: chunks of a stage, experts, what is recomputed."""
    shape = model.shape
    sized = replace(base, tp=tp, cp=cp, pp=pp, vpp=1, ep=1, sequence_parallel=tp > 1, micro_batch=1)
    if sized.misfit(model):
        return []
    chunks = _divisors(shape.layers // pp) if pp > 1 else [1]
    shares = _divisors(shape.experts) if shape.experts else [1]
    spread = [replace(sized, vpp=vpp, ep=ep) for vpp in chunks for ep in shares]
    return [
        replace(layout, recompute=recompute, keep_attention_output=keep)
        for layout in spread
        if not layout.misfit(model)
        for recompute, keep in RECOMPUTE
    ]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
