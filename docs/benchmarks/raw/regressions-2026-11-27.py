"""What this code does with each input of a list, for the table in regressions-2026-11-27.md.

    PYTHONPATH=TREE:TREE/kernels python regressions-2026-11-27.py TREE WORK_FOLDER [PART ...]

Uses only what every version has: the command lines and the launcher.
"""

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

TREE, WORK = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
PARTS = sys.argv[3:]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch  # noqa: E402 - reads the environment set above when it is imported
import yaml  # noqa: E402 - third-party imports stay together

torch.set_num_threads(1)
NOISE = re.compile(
    r"^--skip-bad|Warning|warnings?\.warn|^\s*$|^  (super|return|File)|INFO|frame #|^\s+\^"
)


def forked(function, limit: float = 60) -> str:
    """Status and last line of a function in a child of its own."""
    log = WORK / "log"
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        try:
            status = function() or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # a child must not go on as its parent, whatever ended it
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    end, status = time.monotonic() + limit, None
    while time.monotonic() < end and status is None:
        done, ended = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(ended) if done else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        status = f"**still running after {limit:.0f} s**"
    lines = [x for x in log.read_text(errors="replace").splitlines() if not NOISE.search(x)]
    log.unlink()
    (WORK / "lines").write_text("\n".join(lines))
    return f"{status}: {(lines or [''])[-1].strip()[:190]}"


def told(*words: str) -> list[str]:
    """Lines of the last child with one of these words."""
    lines = (WORK / "lines").read_text().splitlines()
    found = [x for x in lines if any(word in x for word in words) and "...." not in x]
    return [x.strip()[:170] for x in found]


def row(name: str, outcome: str) -> None:
    print(f"| {name} | {outcome.replace('|', '/').replace(str(WORK), '.')} |", flush=True)


def cli(*arguments: str, limit: float = 60) -> str:
    from s2megatron.cli import main

    return forked(lambda: main([str(a) for a in arguments]), limit)


def data() -> None:
    src = WORK / "data"
    shutil.rmtree(src, ignore_errors=True)
    src.mkdir()
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    inputs = {
        "a gzip file, c.jsonl.gz": ("c.jsonl.gz", gzip.compress(lines)),
        "two JSON lines in .json": ("c.json", lines),
        "the same in .ndjson": ("c.ndjson", lines),
        "the same in .JSONL": ("c.JSONL", lines),
        "UTF-16 text": ("u.txt", "täxt".encode("utf-16")),
        "a binary file": ("b.txt", b"\x7fELF\x02\x01\0\0"),
        "JSONL with an invalid byte": ("i.jsonl", lines + b'{"text": "\xff"}\n'),
        "a lone surrogate": ("s.jsonl", lines + b'{"text": "\\ud800"}\n'),
        '"text": null': ("n.jsonl", lines + b'{"text": null}\n'),
        '"text": 5': ("five.jsonl", lines + b'{"text": 5}\n'),
        '"text": a list': ("l.jsonl", lines + b'{"text": ["a"]}\n'),
        "a byte order mark before JSONL": ("m.jsonl", b"\xef\xbb\xbf" + lines),
    }
    for name, (file, content) in inputs.items():
        (src / file).write_bytes(content)
        row(name, cli("data", src / file, "--out", src / "out"))
    (src / "far").mkdir()
    (src / "far" / "x.txt").write_text("far")
    (src / "in").mkdir()
    (src / "in" / "a.txt").write_text("near")
    (src / "in" / "link").symlink_to(src / "far")
    row("a symlinked folder inside the input", cli("data", src / "in", "--out", src / "out"))
    os.environ["HOME"] = str(src)
    os.chdir(src)
    outcome = cli("data", src / "in", "--out", "~/here")
    row("--out ~/here", f"{outcome}; a folder named ~: {(src / '~').exists()}")


TINY = {
    "sparsity": {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}},
    "megatron": {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2,
        "group_query_attention": True, "num_query_groups": 1, "swiglu": True,
        "normalization": "RMSNorm", "disable_bias_linear": True, "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True, "seq_length": 64,
        "max_position_embeddings": 64, "micro_batch_size": 1, "global_batch_size": 2,
        "train_iters": 3, "lr": 0.003, "min_lr": 0.0003, "lr_decay_style": "cosine",
        "lr_warmup_iters": 1, "log_interval": 1, "eval_iters": 0, "save_interval": 2,
    },
    "data": {"tokenizer": "bytes", "mock": True},
}  # fmt: skip


def run_file(name: str = "run.yaml", text: str | None = None, **changes) -> Path:
    path = WORK / name
    tree = TINY | {"megatron": TINY["megatron"] | changes}
    path.write_text(text or yaml.safe_dump(tree))
    return path


def pretrain(config: Path, *overrides: str, limit: float = 60) -> str:
    from s2megatron import pretrain as launcher

    def run() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if "--dry-run" not in overrides:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        return launcher.main(["--config", str(config), *overrides])

    return forked(run, limit)


def run_files() -> None:
    twice = yaml.safe_dump(TINY) + "megatron: {num_layers: 2}\n"
    row("`megatron:` twice", cli("show", run_file("a.yaml", twice)))
    inner = yaml.safe_dump(TINY).replace("  num_layers: 2\n", "  num_layers: 4\n  num_layers: 2\n")
    row("a key twice", cli("show", run_file("b.yaml", inner)))
    row("num_layers: on", cli("show", run_file(num_layers=True)))
    dashed = yaml.safe_dump(TINY).replace("num_layers", "num-layers")
    row("num-layers in `show`", cli("show", run_file("c.yaml", dashed)))
    row("lr_warmup_iters >= train_iters, --dry-run",
        pretrain(run_file(lr_warmup_iters=3), "--dry-run"))  # fmt: skip
    without = {k: v for k, v in TINY["megatron"].items() if k != "micro_batch_size"}
    file = run_file("d.yaml", yaml.safe_dump(TINY | {"megatron": without}))
    row("no micro_batch_size", pretrain(file, "--dry-run"))
    row("`show` with an unknown megatron option", cli("show", run_file(hiden_size=8)))
    for name in ("nodir/x.png", "x.foo", "."):
        row(f"`show --plot {name}`", cli("show", run_file(), "--plot", WORK / name))
    only = run_file("e.yaml", yaml.safe_dump({"sparsity": TINY["sparsity"]}))
    row("a run file with `sparsity:` only", pretrain(only, "--dry-run"))
    row("`plan --gpu run.yaml`", cli("plan", run_file(), "--gpus", "1", "--gpu", run_file()))
    row("`calibrate` without a GPU", cli("calibrate", "--out", WORK / "x.yaml", limit=20))


def checkpoints() -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    hf = WORK / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=257, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(hf / "one")
    config = run_file(vocab_size=257, norm_epsilon=1e-6)

    def convert(name: str, change, source: str = "one", run=config) -> None:
        folder = WORK / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(WORK / "out", ignore_errors=True)
        shutil.copytree(hf / source, folder)
        change(folder)
        row(name, cli("convert", "to-megatron", folder, "--out", WORK / "out", "--config", run))

    def edit(folder: Path, **fields) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def dtypes(folder: Path, name: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: v.bfloat16() if name in k else v for k, v in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    index = '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
    convert("(a sound folder)", lambda f: None)
    convert("an index without its shards beside a single file",
            lambda f: (f / "model.safetensors.index.json").write_text(index))  # fmt: skip
    convert("intermediate_size: 96.0", lambda f: edit(f, intermediate_size=96.0))
    convert('vocab_size: "128"', lambda f: edit(f, vocab_size="128"))
    convert("bos_token_id: [1]", lambda f: edit(f, bos_token_id=[1]))
    convert("q in bf16, k and v in float32", lambda f: dtypes(f, "q_proj"))
    convert("k in bf16, q and v in float32", lambda f: dtypes(f, "k_proj"))
    convert("up in bf16, gate in float32", lambda f: dtypes(f, "up_proj"))
    rope = {"rope_type": "default", "rope_theta": 1e4}
    routed = dict(num_local_experts=4, num_experts_per_tok=2)
    mixtral = transformers.MixtralConfig(**shape, rope_parameters=rope, **routed)
    model = transformers.MixtralForCausalLM(mixtral)
    model.save_pretrained(hf / "fused", save_original_format=False)
    experts = run_file("x.yaml", vocab_size=257, norm_epsilon=1e-5, num_experts=4,
                       moe_router_topk=2, moe_ffn_hidden_size=64, moe_grouped_gemm=False,
                       moe_token_dispatcher_type="alltoall")  # fmt: skip
    convert("a Mixtral in transformers 5's fused form", lambda f: None, "fused", experts)

    from s2megatron import hf as ours

    positions = torch.cat([torch.arange(30), torch.arange(34)])[None]

    def packed(**more):
        def run() -> int:
            record = json.loads((hf / "one" / "config.json").read_text())
            model = transformers.AutoModelForCausalLM.from_pretrained(hf / "one")
            setattr(model.config, ours.NAME, sparsity())
            model.set_attn_implementation("s2")
            ids = torch.zeros(1, 64, dtype=torch.long)
            model(ids, position_ids=positions, **more)
            print("no error", record["model_type"])
            return 0

        return forked(run)

    def sparsity():
        try:
            from s2_kernels.record import record
        except ImportError:
            from s2megatron.checkpoint.record import record
        from s2_kernels import local_stride

        pattern = local_stride(heads=2, kv_heads=1, block_size=16, local_blocks=1, stride=2)
        return record((pattern,) * 2)

    ones = torch.ones(1, 64, dtype=torch.long)
    for name, more in {"default cache": {}, "use_cache=False": {"use_cache": False},
                       "an all-ones mask": {"attention_mask": ones}}.items():  # fmt: skip
        row(f"two packed documents, {name}", packed(**more))


def operate() -> None:
    base = WORK / "base"
    shutil.rmtree(base, ignore_errors=True)
    config = run_file()
    foreground = "megatron.async_save=false"  # the old code's last save hung on a CPU
    row("(the first start)", pretrain(config, f"output.folder={base}", foreground))
    hung = pretrain(config, f"output.folder={WORK / 'hung'}", limit=60)
    row("the last save of a run, in the background", hung)

    def again(name: str, change=lambda folder: None, *overrides: str, words=(), **more) -> Path:
        folder = WORK / "again"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        change(folder / "checkpoints")
        outcome = pretrain(config, f"output.folder={folder}", foreground, *overrides, **more)
        row(name, "; ".join([outcome, *dict.fromkeys(told(*words) if words else [])]))
        return folder

    tracker = "latest_checkpointed_iteration.txt"
    said = ("resuming from", "is damaged", "is missing", "names", "iteration        4/")
    longer = ("megatron.train_iters=5", "megatron.override_opt_param_scheduler=true")
    again("garbage in the tracker", lambda c: (c / tracker).write_text("x?"), *longer, words=said)
    again("the tracker is missing", lambda c: (c / tracker).unlink(), *longer, words=said)
    again("the tracker names none", lambda c: (c / tracker).write_text("9"), *longer, words=said)

    def flip(c: Path, end: bool = False) -> None:
        file = c / "iter_0000003" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        archives = [m.start() for m in re.finditer(rb"data/0FB", content)]
        data = max(archives, key=lambda at: content.index(b"PK\1\2", at) - at)  # the largest
        place = content.index(b"PK\1\2", data) if end else data + 2000
        content[place : place + 40] = bytes(255 - byte for byte in content[place : place + 40])
        file.write_bytes(content)

    again("random bytes among the weights", flip, *longer, words=said)
    again("random bytes that torch cannot read", lambda c: flip(c, True), *longer, words=said)
    for option in ("hidden_size=64", "num_layers=4", "lr=0.002", "train_iters=6",
                   "global_batch_size=4", "seed=7", "seq_length=32",
                   "make_vocab_size_divisible_by=256"):  # fmt: skip
        name = option.partition("=")[0]
        also = [] if name in ("lr", "train_iters", "global_batch_size") else longer[:1]
        also = [*also, longer[1]] if also else []
        again(f"another {name} on resume", lambda c: None, f"megatron.{option}", *also,
              words=(f"megatron.{name}", "padded_vocab"))  # fmt: skip
    again("the distributed optimizer, the same layout", lambda c: None,
          "megatron.use_distributed_optimizer=true", *longer)  # fmt: skip
    dist = WORK / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    options = [f"output.folder={dist}", foreground, "megatron.use_distributed_optimizer=true"]
    pretrain(config, *options)
    row("the same, from its own checkpoint", pretrain(config, *options, *longer))
    done = again("a run that had ended, started again")
    before, after = ((f / "checkpoints/iter_0000003/.metadata").stat().st_mtime_ns
                     for f in (base, done))  # fmt: skip
    row("... its last checkpoint", "written over itself" if after - before > 10**9 else "kept")

    def lock(c: Path) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getppid(), "job": "", "restart": "0",
                  "since": "yesterday", "started": time.time() - 1e6}  # fmt: skip
        (c.parent / "run.lock").write_text(json.dumps(holder))

    again("a lock whose number is another process's now", lock, words=("took over",))
    (WORK / "file").write_text("")
    row("a folder that cannot be made", pretrain(config, f"output.folder={WORK / 'file' / 'x'}"))


def kill_writer() -> None:
    config, folder = run_file(train_iters=4000), WORK / "killed"
    shutil.rmtree(folder, ignore_errors=True)

    def run() -> int:
        from megatron.core.dist_checkpointing.strategies import async_utils

        schedule = async_utils.PersistentAsyncCaller.schedule_async_call

        def then_kill(self, request):
            schedule(self, request)
            if request.call_idx == 1:
                os.kill(self.process.pid, signal.SIGKILL)

        async_utils.PersistentAsyncCaller.schedule_async_call = then_kill
        from s2megatron import pretrain as launcher

        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT="29617")  # fmt: skip
        return launcher.main(["--config", str(config), f"output.folder={folder}"])

    row("the background writer is killed", forked(run, 40))


def agents() -> None:
    env = os.environ | {"PYTHONPATH": f"{TREE}:{TREE / 'kernels'}"}
    run = run_file()

    def agent(*arguments: str, limit: float, signal_at: str = "") -> str:
        command = [sys.executable, "-u", "-m", "s2megatron.agent", *arguments]
        command += ["--", "--config", str(run)]
        log, start = WORK / "agent", time.monotonic()
        with log.open("w") as stream:
            job = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, cwd=TREE)
            if signal_at:
                time.sleep(1.0)
                job.send_signal(signal.SIGTERM)
            try:
                status = job.wait(limit)
            except subprocess.TimeoutExpired:
                job.kill()
                status = f"**still running after {limit:.0f} s**"
        lines = [x for x in log.read_text().splitlines() if not NOISE.search(x)]
        return f"{status} after {time.monotonic() - start:.0f} s: {(lines or [''])[-1][:170]}"

    row("SIGTERM in the first second", agent(limit=60, signal_at="1"))
    row("NNODES=0", agent("--nnodes", "0", limit=60))
    row("a second node whose first does not answer, WAIT=5",
        agent("--nnodes", "2", "--node-rank", "1", "--master-port", "29618", "--wait", "5",
              limit=90))  # fmt: skip


def main() -> None:
    import megatron.training  # noqa: F401 - once, before the forks

    from s2megatron import cli as _  # noqa: F401 - once, before the forks

    WORK.mkdir(parents=True, exist_ok=True)
    for part in (data, run_files, checkpoints, operate, kill_writer, agents):
        if not PARTS or part.__name__ in PARTS:
            print(f"\n## {part.__name__}\n\n| input | outcome |\n| --- | --- |", flush=True)
            part()
    os._exit(0)


if __name__ == "__main__":
    main()
