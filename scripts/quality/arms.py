"""The patterns that the quality study compares, and their run files.

    python scripts/quality/arms.py            # writes configs/quality/ARM.yaml
    python scripts/quality/arms.py --list     # what each arm attends to, and at what density

`ARMS` is the one table. All arms are the same model with the same options: they differ in their
`sparsity:` section alone; those named smollm2-... are SmolLM2-135M. Lengths, batches, learning
rates and data are the recipe's (recipe.py), which may change the size of the model, too.
"""

import argparse
from pathlib import Path

import yaml

from s2_kernels.pattern import LayerPattern
from s2megatron.config import SparsityConfig, parse_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "quality"
BLOCK = 64

MODEL = {
    "num_layers": 12,
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "swiglu": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1.0e-5,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "init_method_std": 0.02,
    "bf16": True,
    # An arm trains for minutes: compiling these at every start does not pay.
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
    # No wait for the GPU in the middle of a step; grad-norm clipping still sees a NaN.
    "check_for_nan_in_loss_and_grad": False,
    "rerun_mode": "disabled",
}
"""Llama's shape, 46M parameters with a vocabulary of 16,384 and tied embeddings."""

SMOLLM2 = MODEL | {
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 9,
    "group_query_attention": True,
    "num_query_groups": 3,
}
"""SmolLM2-135M. It was trained with rotary_base 100,000 at 8,192 tokens; 500,000 is for 32,768."""


def shards(window: int, stride, *layers: dict, **more) -> dict:
    """Window (tokens) + stride (blocks), their shards spread evenly over the heads."""
    widest = max(stride) if isinstance(stride, list) else stride
    default = {"local_blocks": window // BLOCK, "stride": stride}
    if not more.get("homogeneous"):
        default["head_step"] = max(1, widest // more.pop("heads", MODEL["num_attention_heads"]))
    return {"block_size": BLOCK, "default": default | more, "layers": list(layers)}


def window(blocks: int, *layers: dict) -> dict:
    """A plain window of so many blocks."""
    default = {"kind": "sliding_window", "local_blocks": blocks}
    return {"block_size": BLOCK, "default": default, "layers": list(layers)}


def dense_layers(which) -> dict:
    return {"layers": which, "kind": "dense"}


def turned(every: int) -> list[dict]:
    """Shards that start one block later in every following layer, `every` layers a round."""
    return [
        {"layers": f"every {every} from {first}", "head_offset": first - 1}
        for first in range(2, every + 1)
    ]


def first_block(window: int, *strides: list[int], more: list[dict] = ()) -> dict:
    """Window (tokens) + a stride (blocks) for every head, all counted from the first block: the
    layers take the lists of strides by turns."""
    default = {"local_blocks": window // BLOCK, "stride": strides[0], "homogeneous": True}
    layers = [
        {"layers": f"every {len(strides)} from {first}", "stride": own}
        for first, own in enumerate(strides[1:], 2)
    ]
    return {"block_size": BLOCK, "default": default, "layers": [*layers, *more]}


FIRST_TWO = dense_layers([1, 2])
FOURTH, SIXTH = dense_layers("every 4"), dense_layers("every 6")
FIRST_STRIDES = ([29, 31, 37], [27, 32, 35], [25, 33, 41])
"""Of SmolLM2's three KV heads, with few factors in common."""
RANGES = [{"stride": 1, "reach": 16}, {"stride": 4, "reach": 64}, {"stride": 16}]

ARMS: dict[str, dict] = {
    "dense": {"block_size": BLOCK, "default": {"kind": "dense"}, "layers": []},
    # The paper's: window 1,024, stride 16, the first two layers dense. Around it, one change each.
    "paper": shards(1024, 16, FIRST_TWO),
    "stride-8": shards(1024, 8, FIRST_TWO),
    "stride-32": shards(1024, 32, FIRST_TWO),
    "window-512": shards(512, 16, FIRST_TWO),
    "window-2048": shards(2048, 16, FIRST_TWO),
    "head-strides": shards(1024, [4, 8, 8, 16, 16, 16, 32, 32], FIRST_TWO),
    "ranges": {
        "block_size": BLOCK,
        "default": {"ranges": RANGES, "head_step": 2},
        "layers": [FIRST_TWO],
    },
    # Where the dense layers are.
    "no-dense": shards(1024, 16),
    "no-dense-stride-8": shards(1024, 8),
    "every-4": shards(1024, 16, FOURTH),
    "every-4-window-512": shards(512, 16, FOURTH),
    "every-6": shards(1024, 16, SIXTH),
    "every-6-window-2048": shards(2048, 32, SIXTH),
    "every-6-from-3": shards(1024, 16, dense_layers("every 6 from 3")),
    "layers-4-8": shards(1024, 16, dense_layers([4, 8])),
    "layer-6": shards(1024, 16, dense_layers([6])),
    "layer-12": shards(1024, 16, dense_layers([12])),
    "every-4-from-2-window-512": shards(512, 16, dense_layers("every 4 from 2")),
    "every-6-dense-head": shards(512, 32, SIXTH, dense_heads=1),
    # Dense heads in every layer in place of dense layers.
    "dense-head": shards(1024, 16, dense_heads=1),
    "dense-heads-2": shards(1024, 16, dense_heads=2),
    # Shards that differ from layer to layer.
    "turned": shards(1024, 16, *turned(2)),
    "turned-dense-head": shards(1024, 16, *turned(2), dense_heads=1),
    "turned-every-6": shards(1024, 8, *turned(5), SIXTH),
    # Controls: equal shards, and plain windows of as many keys (at 8k, and at 32k).
    "homogeneous": shards(1024, 16, homogeneous=True),
    "plain-8k": window(20),
    "plain-8k-stride-8": window(24),
    "plain-32k": window(32),
    "plain-8k-every-4": window(20, FOURTH),
    "plain-8k-every-6": window(20, SIXTH),
    "plain-32k-every-6": window(32, SIXTH),
    # The pilot's: window 512, stride 8, no dense layers, and its controls.
    "pilot": shards(512, 8),
    "pilot-homogeneous": shards(512, 8, homogeneous=True),
    "pilot-plain-8k": window(16),
    # SmolLM2's three KV heads hold three shards: stride 3, or turned from layer to layer.
    "smollm2-dense": {"block_size": BLOCK, "default": {"kind": "dense"}, "layers": []},
    "smollm2-every-6": shards(1024, 12, *turned(4), SIXTH, heads=3),
    "smollm2-turned": shards(1024, 12, *turned(4), heads=3),
    "smollm2-chosen": shards(1024, 12, *turned(4), dense_layers([13, 15, 16, 19, 20, 23]), heads=3),
    # Every head keeps the first block, which a dense model attends to wherever nothing else is
    # asked for: shards differ by their strides. Dense layers of these two by `choose-dense`.
    "smollm2-first-block": first_block(2048, *FIRST_STRIDES),
    "smollm2-first": first_block(2048, *FIRST_STRIDES, more=[dense_layers([1, 9, 18, 19, 21, 24])]),
    "smollm2-stride-3": shards(1024, 3, heads=3),
}
"""Name -> the `sparsity:` section of its run file."""

DENSE = ("dense", "smollm2-dense")
"""The arms that all others of their model are measured by."""

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("no-dense", "homogeneous", "different shards against equal ones, no dense layers"),
    ("no-dense", "plain-8k", "against a plain window of equal keys, no dense layers"),
    ("no-dense", "plain-32k", "the same, as many keys at 32k"),
    ("every-6", "plain-8k-every-6", "against a plain window, every sixth layer dense"),
    ("every-6", "plain-32k-every-6", "the same, as many keys at 32k"),
    ("every-4", "plain-8k-every-4", "against a plain window, every fourth layer dense"),
    ("every-6", "paper", "two dense layers spread out against the first two"),
    ("every-6-window-2048", "plain-32k-every-6", "shards of stride 32 behind a window of 2,048"),
    ("every-6-from-3", "every-6", "dense layers 3 and 9 against 6 and 12"),
    ("layers-4-8", "every-6", "dense layers 4 and 8 against 6 and 12"),
    ("layer-12", "every-6", "the last layer dense against layers 6 and 12"),
    ("layer-12", "layer-6", "the last layer dense against the sixth"),
    ("every-6-dense-head", "every-6", "a dense head in the others, half their window"),
    ("no-dense-stride-8", "no-dense", "eight shards that cover all against half of sixteen"),
    (
        "no-dense-stride-8",
        "plain-8k-stride-8",
        "all shards against a window of as many keys at 8k",
    ),
    ("no-dense", "plain-8k-stride-8", "half of the shards against a plain window of more keys"),
    ("turned", "no-dense", "shards turned from layer to layer"),
    ("turned-every-6", "every-6", "stride 8 and turned against stride 16, every sixth dense"),
    (
        "smollm2-first",
        "smollm2-chosen",
        "SmolLM2: the first block in every head and twice the window against turned shards",
    ),
    ("smollm2-every-6", "smollm2-stride-3", "SmolLM2: every sixth dense against stride 3"),
)
"""What the study claims, or finds not to hold: an arm, its control, and what their difference
says."""


def model(arm: str) -> dict:
    """Megatron's options of an arm's model."""
    return SMOLLM2 if arm.startswith("smollm2-") else MODEL


def patterns(arm: str) -> tuple[LayerPattern, ...]:
    """What each layer of an arm attends to."""
    of = model(arm)
    heads = of["num_attention_heads"]
    return SparsityConfig.model_validate(ARMS[arm]).resolve(
        num_layers=of["num_layers"], heads=heads, kv_heads=of.get("num_query_groups", heads)
    )


def density(arm: str, tokens: int) -> float:
    """Kept pairs over the pairs of dense causal attention, all layers and heads together."""
    found = patterns(arm)
    kept = sum(pattern.kept_pairs(tokens) for pattern in found)
    heads = model(arm)["num_attention_heads"]
    return kept / (len(found) * heads * tokens * (tokens + 1) // 2)


def run_file(arm: str) -> str:
    """The text of configs/quality/ARM.yaml."""
    tree = {"sparsity": ARMS[arm], "megatron": model(arm)}
    parse_config(tree)
    head = (
        f"# Arm {arm!r} of the quality study, made by scripts/quality/arms.py from its table.\n"
        "# Lengths, batches, learning rates and data come from the recipe (docs/quality.md).\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False, width=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the densities, write nothing")
    parser.add_argument("--names", action="store_true", help="print the names, write nothing")
    a = parser.parse_args()
    if a.names:
        print("\n".join(ARMS))
        return
    if a.list:
        print(f"{'arm':<20} {'at 8k':>7} {'at 32k':>7} {'at 128k':>7}")
        for arm in ARMS:
            shares = (density(arm, tokens) for tokens in (8192, 32768, 131072))
            print(f"{arm:<20} " + " ".join(f"{share:>7.1%}" for share in shares))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        (FOLDER / f"{arm}.yaml").write_text(run_file(arm), encoding="utf-8")


if __name__ == "__main__":
    main()
