"""How a model is spread over GPUs: sizes of TP, PP, DP and EP, the batch, what is recomputed."""

from dataclasses import dataclass, replace

from s2megatron.accounting import ModelShape
from s2megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Megatron's order of ranks: TP innermost, then EP within DP, then DP, then PP."""

    gpus: int
    tp: int = 1
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
        return self.gpus // (self.tp * self.pp)

    @property
    def micro_batches(self) -> int:
        return self.global_batch // (self.micro_batch * self.dp)

    def misfit(self, shape: ModelShape) -> str:
        """'' where the model and the batch divide over the axes, else what does not."""
        if self.gpus % (self.tp * self.pp):
            return f"TP {self.tp} x PP {self.pp} does not divide {self.gpus} GPUs"
        if shape.heads % self.tp or (shape.kv_heads % self.tp and self.tp % shape.kv_heads):
            return f"TP {self.tp} does not divide {shape.heads} heads ({shape.kv_heads} KV heads)"
        if shape.ffn % self.tp or shape.vocab % self.tp:
            return f"TP {self.tp} does not divide the MLP ({shape.ffn}) or the vocabulary"
        if shape.layers % (self.pp * self.vpp):
            return f"PP {self.pp} x VPP {self.vpp} does not divide {shape.layers} layers"
        if self.sequence_parallel and shape.seq_len % self.tp:
            return f"TP {self.tp} does not divide {shape.seq_len} tokens"
        if self.global_batch % (self.micro_batch * self.dp):
            return (
                f"global batch {self.global_batch} is not a multiple of micro-batch "
                f"{self.micro_batch} x DP {self.dp}"
            )
        if self.vpp > 1 and (self.pp == 1 or self.micro_batches % self.pp):
            return f"VPP needs PP > 1 and micro-batches ({self.micro_batches}) a multiple of it"
        if self.ep > 1 and (not shape.experts or shape.experts % self.ep or self.dp % self.ep):
            return f"EP {self.ep} does not divide {shape.experts} experts and DP {self.dp}"
        return ""

    def stages(self, layers: int) -> list[list[int]]:
        """Layers (0-based) of each pipeline stage; with VPP a stage holds several chunks."""
        per_chunk = layers // (self.pp * self.vpp)
        stages = []
        for stage in range(self.pp):
            firsts = [(chunk * self.pp + stage) * per_chunk for chunk in range(self.vpp)]
            stages.append([first + i for first in firsts for i in range(per_chunk)])
        return stages

    def __str__(self) -> str:
        parts = [f"TP {self.tp}{' + SP' if self.sequence_parallel else ''}", f"PP {self.pp}"]
        if self.vpp > 1:
            parts[-1] += f" x{self.vpp}"
        parts.append(f"DP {self.dp}")
        if self.ep > 1:
            parts.append(f"EP {self.ep}")
        attention = self.recompute == "full" and not self.keep_attention_output
        return (
            f"{', '.join(parts)}, recompute {self.recompute}{' + attention' if attention else ''}"
        )


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


RECOMPUTE = (("none", True), ("core_attn", True), ("full", True), ("full", False))
"""What a search tries: recompute, and whether sparse layers keep attention's output under it."""


def candidates(base: Layout, shape: ModelShape, *, most_tp: int) -> list[Layout]:
    """Every layout of `base.gpus` GPUs that the model and the global batch divide over.

    Micro-batches are of one sequence (long sequences fill a GPU).
    """
    found = []
    for tp in _divisors(min(most_tp, base.gpus)):
        for pp in _divisors(base.gpus // tp) if base.gpus % tp == 0 else []:
            chunks = shape.layers // pp if shape.layers % pp == 0 else 1
            for vpp in _divisors(chunks) if pp > 1 else [1]:
                for ep in _divisors(shape.experts) if shape.experts else [1]:
                    for recompute, keep in RECOMPUTE:
                        layout = replace(
                            base, tp=tp, pp=pp, vpp=vpp, ep=ep, sequence_parallel=tp > 1,
                            micro_batch=1, recompute=recompute, keep_attention_output=keep,
                        )  # fmt: skip
                        if not layout.misfit(shape):
                            found.append(layout)
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
