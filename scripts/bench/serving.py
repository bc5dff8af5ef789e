"""Times vLLM serving an S2 model against the same model dense, in the same vLLM, on one GPU.

    python3 scripts/bench/serving.py --lengths 8192,32768,131072 --batches 1,16,64

A model of Llama's shape with random weights (`--load-format dummy`); window 1,024 tokens, blocks of
64. Each provider runs in a process of its own: "s2", and "dense", the folder without its `s2` key.
Of every length and batch: how many sequences of that length the cache has room for, seconds from a
prompt to its first token, and tokens a second while `batch` requests decode, or as many of them as
run at a time. Every prompt is its own, and all are prefilled. Before that comes one request of the
first length, so that rows are of a warm engine; what it waited is told apart. Writes NAME.json and
NAME.md.

    python3 scripts/bench/serving.py --load 200 --shape 1.3b --lengths 8192

sends so many requests of mixed lengths in place of that, takes a fifth of them back, and compares
every answer with what the same request gets alone (serving_load.py). When --deadline nears, it says
how many were compared until then.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

import serving_load

from s2_kernels import dense, local_stride
from s2_kernels.record import record
from s2megatron import provenance

PROVIDERS = ("s2", "dense")
VOCAB = 32000
SHAPES = {  # layers, hidden, ffn, heads, KV heads
    "1.3b": (24, 2048, 5504, 16, 16),
    "8b": (32, 4096, 14336, 32, 8),
    "tiny": (2, 128, 256, 4, 2),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--lengths", default="8192,32768,131072", help="tokens of a prompt")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--cases", help="LENGTH:BATCH,..., in this order, in place of both")
    parser.add_argument("--providers", help="default: s2,dense; with --load, s2")
    parser.add_argument("--load", type=int, metavar="REQUESTS", help="see above")
    parser.add_argument("--dtype", help="default: bfloat16; on the CPU and with --load float32")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--local-blocks", type=int, default=16)
    parser.add_argument("--stride", type=int, default=16, help="in blocks")
    parser.add_argument("--dense-layers", type=int, default=0, help="the first so many are dense")
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        help="steps that are timed; of --load, the most new tokens",
    )
    parser.add_argument("--chunk", type=int, default=8192, help="--max-num-batched-tokens")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--pages", type=int, help="in the cache, to try out; default: what fits")
    parser.add_argument("--memory", type=float, help="share of the GPU's; default: vLLM's own")
    parser.add_argument("--deadline", type=float, default=250, help="seconds of a provider")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--name", help="of the files; default: serving-GPU-DATE")
    parser.add_argument("--in-this-process", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    pairs = [(n, b) for n in a.lengths.split(",") for b in a.batches.split(",")]
    if a.cases:
        pairs = [case.split(":") for case in a.cases.split(",")]
    a.cases = [(int(tokens), int(batch)) for tokens, batch in pairs]
    a.providers = a.providers or ("s2" if a.load else ",".join(PROVIDERS))
    a.dtype = a.dtype or ("float32" if a.load or a.device == "cpu" else "bfloat16")
    return a


def make_folder(a, provider: str, folder: Path) -> Path:
    """A config.json, which is all that random weights need."""
    layers, hidden, ffn, heads, kv_heads = SHAPES[a.shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads, "max_position_embeddings": 1 << 20, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": a.dtype,
    }  # fmt: skip
    if provider == "s2":
        shape = dict(heads=heads, kv_heads=kv_heads, block_size=a.block_size)
        sparse = local_stride(**shape, local_blocks=a.local_blocks, stride=a.stride)
        full = (dense(**shape),) * a.dense_layers
        config["s2"] = record(full + (sparse,) * (layers - a.dense_layers))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokens_to_ask_for(a, tokens: int, batch: int) -> int:
    """So many that no request ends before the last prompt is through and the pace is timed.

    A request that decodes gets a token with every chunk of the others' prompts.
    """
    return batch * -(-tokens // a.chunk) + a.tokens + 8


def start(a, provider: str, folder: Path):
    """vLLM's engine in this process, so that steps can be counted."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    from s2_vllm.plugin import register

    register()  # where the checkout is not installed, there is no entry point
    longest = max(tokens + tokens_to_ask_for(a, tokens, batch) for tokens, batch in a.cases)
    if a.load:
        longest = max(tokens for tokens, _ in a.cases) + a.tokens
    return LLM(
        model=str(make_folder(a, provider, folder)),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=max(batch for _, batch in a.cases),
        max_num_batched_tokens=min(a.chunk, longest),
        enforce_eager=a.eager or a.device == "cpu",
        enable_prefix_caching=bool(a.load),
        num_gpu_blocks_override=a.pages,
        **({} if a.memory is None else {"gpu_memory_utilization": a.memory}),
    ).llm_engine


def sequences_that_fit(engine, tokens: int) -> int:
    """Sequences of so many tokens that the cache has pages for, all decoding."""
    config = engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    pages = [
        spec.held.most(tokens, 1) if hasattr(spec, "held") else -(-tokens // spec.block_size)
        for spec in specs
    ]
    return (config.num_blocks - 1) // sum(pages)


class Decoding:
    """`batch` requests of `tokens` tokens each: the time to the first token, then the pace."""

    def __init__(self, engine, a, tokens: int, batch: int):
        from vllm import SamplingParams

        self.engine, self.batch, self.timed = engine, batch, a.tokens
        most = tokens_to_ask_for(a, tokens, batch)
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        for i in range(batch):
            ids = [(7919 * (i + 1) + 31 * k) % 31000 for k in range(tokens)]
            engine.add_request(str(i), {"prompt_token_ids": ids}, params)

    def run(self, deadline: float) -> dict:
        """Steps that only decode are timed: all prompts are through that have room.

        Then all requests are taken back.
        """
        scheduler = self.engine.engine_core.engine_core.scheduler
        began, first, counts, paces = time.perf_counter(), None, {}, {}
        while self.engine.has_unfinished_requests():
            timed = max(map(len, paces.values()), default=0)
            if timed >= self.timed or time.time() > deadline:
                self.engine.abort_request([str(i) for i in range(self.batch)])
                continue
            before, at = sum(counts.values()), time.perf_counter()
            for out in self.engine.step():
                counts[out.request_id] = len(out.outputs[0].token_ids)
            took, new = time.perf_counter() - at, sum(counts.values()) - before
            if new and first is None:
                first = time.perf_counter() - began
            running = len(scheduler.running)
            if new == running > 0:
                paces.setdefault(running, []).append(took)
        while scheduler.has_requests():
            self.engine.step()
        row = dict(first_s=first)
        if paces:
            most = max(paces)
            took = sorted(paces[most])
            row |= dict(running=most, step_ms=1000 * took[len(took) // 2])
            row["tokens_s"] = 1000 * most / row["step_ms"]
        return row


def measure(a, provider: str) -> dict:
    began = time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engine = start(a, provider, Path(folder))
        ready = time.time()
        if a.load:
            longest = max(tokens for tokens, _ in a.cases)
            left = began + a.deadline - time.time()
            load = serving_load.Load(engine, a.load, longest, a.tokens, VOCAB, left)
            rows.append(dict(provider=provider, **load.run()))
            print(serving_load.line(rows[0]), flush=True)
            return _described(a, rows)
        tokens = a.cases[0][0]
        first = Decoding(engine, a, tokens, 1).run(began + a.deadline)["first_s"]
        result = dict(start_s=ready - began, first_request=dict(tokens=tokens, first_s=first))
        print(told_apart(provider, result), flush=True)
        for tokens, batch in a.cases:
            fits = sequences_that_fit(engine, tokens + a.tokens)
            row = dict(provider=provider, tokens=tokens, batch=batch, fits=fits)
            if time.time() - began > a.deadline:
                print(f"{provider}: out of time at {tokens} tokens, batch {batch}", flush=True)
                break
            row |= Decoding(engine, a, tokens, batch).run(began + a.deadline)
            rows.append(row)
            print(line(row), flush=True)
    return _described(a, rows) | result


def _described(a, rows: list[dict]) -> dict:
    import torch
    import vllm

    made = dict(device=provenance.machine(a.device), torch=torch.__version__)
    made |= provenance.describe(ROOT, ("triton",))
    return dict(**made, vllm=vllm.__version__, rows=rows)


HEADING = (
    "| tokens | batch | who | sequences that fit | first token s | run together | ms a step "
    "| tokens/s |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def told_apart(provider: str, result: dict) -> str:
    """A sentence on the first request after the start, which no row of the table is about."""
    first = result["first_request"]
    found = "not reached" if first["first_s"] is None else f"after {first['first_s']:.2f} s"
    return (
        f"{provider}: vLLM started in {result['start_s']:.0f} s; the first token of its first "
        f"request, {first['tokens']:,} tokens: {found}. In the table first tokens are of later "
        "requests."
    )


def line(row: dict) -> str:
    if "first_s" not in row:
        return serving_load.line(row)
    first = "" if row["first_s"] is None else f"{row['first_s']:.2f}"
    pace = " | | |"
    if "running" in row:
        pace = f" {row['running']} | {row['step_ms']:.2f} | {row['tokens_s']:,.0f} |"
    case = f"| {row['tokens']:,} | {row['batch']} | {row['provider']} | {row['fits']} |"
    return f"{case} {first} |{pace}"


def write(results: list[dict], a) -> Path:
    """NAME.json and NAME.md of the providers' results; returns the latter."""
    device = results[0]["device"]
    card = device.split()[1].lower() if " " in device else "cpu"
    kind = "serving-load" if a.load else "serving"
    name = a.name or f"{kind}-{card}-{datetime.date.today()}"
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    layers, _, _, heads, kv_heads = SHAPES[a.shape]
    command = shlex.join(["python3", "scripts/bench/serving.py", *sys.argv[1:]])
    text = (
        f"# vLLM serves a model of {a.shape}'s shape, {a.providers}: {device}\n\n"
        f"`{command}`; vllm {results[0]['vllm']}, torch {results[0]['torch']}, "
        f"commit {results[0]['commit']}; {layers} layers, "
        f"{heads} heads on {kv_heads} KV heads; S2: window {a.local_blocks * a.block_size:,} "
        f"tokens, stride {a.stride}, {a.dense_layers} dense layers. Random weights, {a.dtype}.\n\n"
    )
    heading = serving_load.HEADING if a.load else HEADING
    rows = "\n".join(line(row) for result in results for row in result["rows"])
    file = a.out / f"{name}.md"
    apart = [
        told_apart(result["rows"][0]["provider"], result)
        for result in results
        if result["rows"] and "first_request" in result
    ]
    file.write_text("\n".join([f"{text}{heading}\n{rows}\n", *apart]).rstrip("\n") + "\n")
    return file


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    a = parse(argv)
    if a.in_this_process:
        a.in_this_process.write_text(json.dumps(measure(a, a.providers)))
        return
    results = []
    for provider in a.providers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [sys.executable, __file__, *argv, "--providers", provider]
            subprocess.run([*command, "--in-this-process", str(out)], check=True)
            results.append(json.loads(out.read_text()))
            file = write(results, a)  # after each: what was measured is there whatever comes next
    print(file)


if __name__ == "__main__":
    main()
