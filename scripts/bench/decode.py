"""Times a token of a 1.3B model in transformers: S2 with pages against dense, on one GPU.

    python3 scripts/bench/decode.py --lengths 8192,32768,131072,524288 --batches 1,16,64

A model of random weights (24 layers, 16 heads of 128), window 1,024 tokens, stride 16, blocks of
64. Who runs: "s2" (`PagedCache`), "s2 graph" (the same as a CUDA graph, small operations fused),
"s2 unfused graph" (if named), "dense pages graph" (this project's decode kernel with a dense
pattern), "dense sdpa" (transformers' DynamicCache and torch's SDPA). Beside every time stands what
its bytes, weights and live keys and values, take at the copy bandwidth measured here. Caches are
filled with noise, not by a prefill; the prefill of one sequence is timed by itself. Writes
NAME.json, NAME.md and NAME.png; what does not fit is said.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

# Found by the line above, which lets the script run in a checkout that is not installed.
from s2_kernels import LayerPattern, dense, local_stride
from s2_kernels.cache import alive_pages
from s2_kernels.record import record
from s2megatron import provenance

PROVIDERS = ("s2 graph", "s2", "dense pages graph", "dense sdpa")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768,131072,524288", help="tokens")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--d", type=int, default=128, help="head size")
    parser.add_argument("--ffn", type=int, help="width; default: 8/3 of heads x d")
    parser.add_argument("--stride", type=int, default=16, help="in blocks of 64 tokens")
    parser.add_argument("--dense-layers", type=int, default=0, help="the first so many are dense")
    parser.add_argument("--steps", type=int, default=24, help="tokens timed")
    parser.add_argument("--prefill", action="store_true", help="time the prefill, too")
    parser.add_argument("--deadline", type=float, default=400, help="seconds, then stop")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--name", help="of the files; default: decode-GPU-DATE")
    return parser.parse_args(argv)


def make_model(a):
    """Llama's shape with random weights, in bfloat16 on the GPU."""
    import transformers

    import s2megatron.hf  # noqa: F401 - registers attention "s2"

    hidden = a.heads * a.d
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=a.ffn or int(hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.d,
        vocab_size=32000,
        max_position_embeddings=1 << 20,
    )
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    with torch.device(a.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="s2"
        )
    return model.eval()


def use(model, patterns: tuple[LayerPattern, ...] | None) -> None:
    """Makes the model compute these patterns, or transformers' own dense attention."""
    model.set_attn_implementation("sdpa" if patterns is None else "s2")
    model.config.s2 = None if patterns is None else record(patterns)
    for module in model.modules():
        module.__dict__.pop("_s2_pattern", None)


def filled_cache(model, provider: str, patterns, batch: int, tokens: int, steps: int):
    """A cache that holds `tokens` tokens of noise in every sequence."""
    import transformers

    from s2megatron.serving.cache import PagedCache

    config = model.config
    if provider == "dense sdpa":
        cache = transformers.DynamicCache(config=config)
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            noise = torch.randn(shape, device=model.device, dtype=model.dtype)
            cache.update(noise, noise, layer)
        return cache
    graph = provider.endswith("graph") and model.device.type == "cuda"
    cache = PagedCache(
        model, batch_size=batch, max_length=tokens + steps, graph=graph,
        fuse="unfused" not in provider,
    )  # fmt: skip
    for pages in (cache.k_pages, cache.v_pages):
        for part in pages.split(1 << 14):
            part.normal_()
    cache.pretend(tokens)
    return cache


@torch.no_grad()
def time_steps(model, cache, batch: int, steps: int) -> float:
    """Milliseconds of a token, the choice of the next one and a wait for it included."""
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    warm = 4
    times = []
    for step in range(warm + steps):
        began = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.cpu()
        if step >= warm:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2] * 1000


@torch.no_grad()
def time_prefill(model, provider: str, tokens: int) -> float:
    """Seconds of one sequence's prompt, the second time."""
    import transformers

    from s2megatron.serving.cache import PagedCache

    ids = torch.randint(3, 32000, (1, tokens), device=model.device)
    for _ in range(2):
        cache = transformers.DynamicCache(config=model.config)
        if provider != "dense sdpa":
            cache = PagedCache(model, max_length=tokens)
        began = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.cpu()
        seconds = time.perf_counter() - began
        del cache
    return seconds


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a kernel that negates what it copies."""
    x = torch.ones((1 << 29) if device == "cuda" else (1 << 22), dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(8):
        x[:1].cpu()
        began = time.perf_counter()
        torch.neg(x, out=y)
        y[:1].cpu()
        best = max(best, 2 * x.nbytes / (time.perf_counter() - began))
    return best


def measure(a) -> dict:
    began = time.time()
    model = make_model(a)
    shape = dict(heads=a.heads, kv_heads=a.kv_heads)
    sparse = local_stride(**shape, local_blocks=16, stride=a.stride)
    full = (dense(**shape),) * a.layers
    s2 = full[: a.dense_layers] + (sparse,) * (a.layers - a.dense_layers)
    bandwidth = copy_bandwidth(a.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.nbytes  # one row of it is read
    page = 2 * 64 * a.d * model.dtype.itemsize
    rows = []
    cases = [
        (tokens, batch, provider)
        for tokens in map(int, a.lengths.split(","))
        for batch in map(int, a.batches.split(","))
        for provider in a.providers.split(",")
    ]
    for tokens, batch, provider in cases:
        if time.time() - began > a.deadline:
            print("out of time", flush=True)
            break
        patterns = None if provider == "dense sdpa" else full if "dense" in provider else s2
        use(model, patterns)
        kept = page * batch * sum(alive_pages(p, tokens) for p in patterns or full)
        row = dict(tokens=tokens, batch=batch, provider=provider, kv_bytes=kept,
                   floor_ms=(weights + kept) / bandwidth * 1000)  # fmt: skip
        # A DynamicCache copies the keys and values of a layer in every step, to make them longer.
        needed = kept * (1 + (4 / a.layers if patterns is None else 0))
        if a.device == "cuda" and needed > free_memory():
            row |= dict(ms=None, note="does not fit")
        else:
            row |= time_row(a, model, provider, patterns, batch, tokens)
        if a.device == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        print(line(row), flush=True)
    made = dict(device=provenance.machine(a.device), torch=torch.__version__)
    made |= provenance.describe(ROOT, ("triton",))
    return dict(**made, copy=bandwidth, weights=weights, rows=rows, layers=a.layers,
                stride=a.stride, dense_layers=a.dense_layers, **shape)  # fmt: skip


def time_row(a, model, provider: str, patterns, batch: int, tokens: int) -> dict:
    """Milliseconds a token, and seconds of a prefill where they are asked for."""
    try:
        cache = filled_cache(model, provider, patterns, batch, tokens, a.steps + 4)
        found = dict(ms=time_steps(model, cache, batch, a.steps))
        del cache
        if a.prefill and batch == 1 and provider in ("s2", "dense sdpa"):
            found["prefill_s"] = time_prefill(model, provider, tokens)
    except torch.OutOfMemoryError:
        return dict(ms=None, note="does not fit")
    return found


def free_memory() -> float:
    free, _ = torch.cuda.mem_get_info()
    return free * 0.95


HEADING = (
    "| tokens | batch | who | ms a token | its bytes take | KV GiB | prefill s |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: dict) -> str:
    ms = row["note"] if row["ms"] is None else f"{row['ms']:.2f}"
    prefill = f"{row['prefill_s']:.2f}" if "prefill_s" in row else ""
    return (
        f"| {row['tokens']:,} | {row['batch']} | {row['provider']} | {ms} | {row['floor_ms']:.2f} "
        f"| {row['kv_bytes'] / 2**30:.2f} | {prefill} |"
    )


def plot(result: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in result["rows"]})
    figure, axes = plt.subplots(1, len(batches), figsize=(4.2 * len(batches), 3.6), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for provider in PROVIDERS:
            rows = [r for r in result["rows"]
                    if (r["batch"], r["provider"]) == (batch, provider) and r["ms"]]  # fmt: skip
            rows.sort(key=lambda row: row["tokens"])  # --lengths may come in any order
            if rows:
                tokens = [row["tokens"] for row in rows]
                (drawn,) = axis.plot(tokens, [r["ms"] for r in rows], "o-", label=provider)
                floors = [row["floor_ms"] for row in rows]
                axis.plot(tokens, floors, ":", color=drawn.get_color(), linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"batch {batch}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a token (dotted: its bytes)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write(result: dict, a) -> None:
    card = result["device"].split()[1].lower() if " " in result["device"] else "cpu"
    name = a.name or f"decode-{card}-{datetime.date.today()}"
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    command = shlex.join(["python3", "scripts/bench/decode.py", *sys.argv[1:]])
    text = (
        f"# A token of a 1.3B model: {result['device']}\n\n"
        f"`{command}`; torch {result['torch']}, commit {result['commit']}; "
        f"{result['layers']} layers, {result['heads']} heads "
        f"on {result['kv_heads']} KV heads, window 1,024, stride {result['stride']}, "
        f"{result['dense_layers']} dense layers; measured copy "
        f"{result['copy'] / 1e12:.2f} TB/s; weights {result['weights'] / 2**30:.2f} GiB.\n\n"
    )
    rows = "\n".join(map(line, result["rows"]))
    (a.out / f"{name}.md").write_text(f"{text}{HEADING}\n{rows}\n\n![times]({name}.png)\n")
    plot(result, a.out / f"{name}.png")
    print(f"{a.out / name}.json, .md, .png")


if __name__ == "__main__":
    arguments = parse()
    write(measure(arguments), arguments)
