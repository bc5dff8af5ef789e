"""Runs many small cases in one process of their own, because the CPU runtime changes the process.

python in_process.py MODULE FUNCTION   -> prints FUNCTION()'s JSON result as the last line
"""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import zygote
from launches import ON_CPU

HERE = Path(__file__).resolve().parent
RESULT = "result "


def call(module: str, function: str, *arguments: str):
    """The JSON result of a function, run in a process of its own."""
    return _call(module, function, *arguments, ranks=None, threads="2")[0]


def call_on_ranks(module: str, function: str, *arguments: str, ranks: int) -> list:
    """The JSON results of a function on ranks of their own, with torchrun's environment."""
    return _call(module, function, *arguments, ranks=ranks, threads="1")


def call_on_gpus(module: str, function: str, *arguments: str, ranks: int) -> list:
    """The same under a real torchrun, which sees the GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
               str(HERE / "in_process.py"), module, function, *arguments]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # Into files: a background writer of checkpoints would keep a pipe open after the ranks' end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = subprocess.run(
            command, stdout=out, stderr=err, timeout=300, cwd=HERE.parents[1], env=env
        ).returncode
        out.seek(0)
        err.seek(0)
        return _results(subprocess.CompletedProcess(command, status, out.read(), err.read()))


def _call(module: str, function: str, *arguments: str, ranks: int | None, threads: str) -> list:
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": threads}
    argv = [module, function, *arguments]
    return _results(zygote.run("in_process:main", argv, ranks=ranks, env=env, timeout=600))


def _results(done: subprocess.CompletedProcess) -> list:
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2500:]}"
    marked = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return [json.loads(line.removeprefix(RESULT)) for line in marked]


def run_command_line(main, argv: list[str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a `main(argv)`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def forget_megatron() -> None:
    """Megatron keeps its arguments in globals that may be set once."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    unset_global_variables()
    unset_num_microbatches_calculator()


def build_model(config: str, *overrides: str):
    """A run file's model, built on one rank by Megatron's own builder: (prepared run, chunks)."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from s2megatron.training.prepare import prepare

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    ready = prepare(config, overrides, writers=False)
    training.initialize_megatron(skip_mpu_initialization=False)
    builder = ready.model_config.get_builder_cls()(ready.model_config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ready, builder.build_distributed_models(groups, wrap_with_ddp=False)


def main() -> None:
    module, function, *arguments = sys.argv[1:]
    sys.argv = sys.argv[:1]
    result = getattr(importlib.import_module(module), function)(*arguments)
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    rooms = (room for room in HERE.parent.iterdir() if room.is_dir())  # their cases, by name
    sys.path[:0] = [str(HERE), *map(str, rooms)]
    status = 1
    try:
        main()
        status = 0
    except Exception:  # reported by the status; an ordinary end may wait for a lost peer for ever
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # hundreds of threads of process groups long destroyed may take minutes to end
