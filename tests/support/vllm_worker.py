"""Serves models, in an environment that has vLLM: `python vllm_worker.py JOBS.json OUT.json`.

A job is a folder, options of `LLM`, and rounds of requests; of each round the tokens are noted and
what the cache held. Without rounds only the configuration is made, which is where most is refused.
"without_plugin" stands in the last job only.
With a pattern in place of a folder random requests meet the cache alone (vllm_traffic.py), with
"ahead" steps meet a GPU that only notes what is compiled (vllm_steps.py).
One process runs all jobs, because importing vLLM takes longer than a job.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler can be looked at

ALWAYS = dict(skip_tokenizer_init=True, enforce_eager=True, dtype="float32")


def serve(job: dict) -> dict:
    """What came of a job's rounds, or the error that kept the engine from starting."""
    from vllm import LLM

    ready = note_ready()
    try:
        engine = LLM(model=job["folder"], **{**ALWAYS, **job["options"]}).llm_engine
    except ValueError as error:
        return {"error": str(error)}
    core = engine.engine_core.engine_core
    counted, chunks = count_preemptions(core.scheduler), note_chunks(job)
    pages = core.scheduler.kv_cache_manager.block_pool
    groups = core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    report = {
        "model": job["options"].get("tensor_parallel_size", 1) == 1
        and type(core.model_executor.driver_worker.worker.get_model()).__name__,
        "pages": pages.num_gpu_blocks,
        "layers_of_groups": [len(group.layer_names) for group in groups],
        "block_size": groups[0].kv_cache_spec.block_size,
        "rounds": [],
    }
    if job.get("graphs"):
        from vllm_graphs import graphs

        worker = core.model_executor.driver_worker.worker
        if not ready:  # on a GPU it was part of the start
            worker.model_runner._dummy_run(4, skip_eplb=True)
        report["ready"] = list(ready)
        report["graphs"] = graphs(engine, worker.get_model())
    for one in job["rounds"]:
        if one.get("forget"):
            assert core.scheduler.reset_prefix_cache()
        free, before = pages.get_num_free_blocks(), len(counted)
        got = run_round(engine, one)
        got |= {"free_before": free, "free_after": pages.get_num_free_blocks()}
        report["rounds"].append(got | {"preemptions": len(counted) - before})
    stop(engine)
    return report | {"chunks": chunks}


def do(job: dict) -> dict:
    if "rounds" in job:
        return serve(job)
    if "ahead" in job:
        from vllm_steps import compiled

        return compiled(job)
    return traffic(job) if "pattern" in job else configure(job)


def traffic(job: dict) -> dict:
    """What random requests met with in the cache of a pattern, without a model."""
    from vllm_traffic import Traffic

    from s2_kernels import LayerPattern

    pattern = LayerPattern.from_key(job["pattern"])
    return Traffic(pattern, job["ranks"], job["pages"], job["seed"]).run(job["steps"])


def configure(job: dict) -> dict:
    """What vLLM would serve, or why it refuses to, before it loads weights."""
    from vllm.engine.arg_utils import EngineArgs

    if job.get("without_plugin"):
        forget_plugin()
    try:
        config = EngineArgs(model=job["folder"], **{**ALWAYS, **job["options"]})
        config = config.create_engine_config()
    except ValueError as error:
        return {"error": str(error)}
    return {
        "architectures": config.model_config.hf_config.architectures,
        "block_size": config.cache_config.block_size,
    }


def forget_plugin() -> None:
    """vLLM as it is where no plugin has been found."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for names in (ModelRegistry.models, MODELS_CONFIG_MAP):
        for name in [name for name in names if name.startswith("S2")]:
            del names[name]


def count_preemptions(scheduler) -> list:
    """A list that grows by one with every preemption."""
    counted, preempt = [], scheduler._preempt_request

    def counting(request, *args, **options):
        counted.append(request.request_id)
        return preempt(request, *args, **options)

    scheduler._preempt_request = counting
    return counted


def note_chunks(job: dict) -> list:
    """A list that grows with every call of paged_prefill: (new tokens, tokens in all).

    It is called from `job["fewest"]` new tokens on; texts here are short.
    """
    from s2_kernels import prefill as made_for
    from s2_vllm import backend

    made_for.FEWEST = job.get("fewest", 256)
    chunks, prefill = [], getattr(backend.paged_prefill, "stock", backend.paged_prefill)

    def noting(q, *args, lengths, **options):
        chunks.extend((q.shape[1], length) for length in lengths)
        return prefill(q, *args, lengths=lengths, **options)

    noting.stock = prefill
    backend.paged_prefill = noting
    return chunks


def note_ready() -> list:
    """A list that grows when kernels are compiled ahead: the KV heads of each layer's pools."""
    from s2_vllm import backend

    ready, stock = [], getattr(backend.get_ready, "stock", backend.get_ready)

    def noting(layers):
        ready.extend([pool.end - pool.first for pool in layer.pools] for layer in layers)
        stock(layers)

    noting.stock = stock
    backend.get_ready = noting
    return ready


def run_round(engine, one: dict) -> dict:
    """All prompts at once; those in `cancel` are taken back after so many steps.

    With "adapter" a LoRA adapter's folder is put upon the model.

    Returns:
        Per prompt its tokens, and how many of the prompt came out of the prefix cache.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=one["max_tokens"], ignore_eos=True, detokenize=False
    )
    adapter = None
    if "adapter" in one:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, one["adapter"])
    for i, prompt in enumerate(one["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=adapter)
    tokens, cached, step = {}, {}, 0
    while engine.has_unfinished_requests():
        step += 1
        for out in engine.step():
            if out.finished:
                tokens[out.request_id] = list(out.outputs[0].token_ids)
                cached[out.request_id] = out.num_cached_tokens
        gone = [i for i, after in one.get("cancel", {}).items() if after == step]
        if gone:
            engine.abort_request(gone)
    while engine.engine_core.engine_core.scheduler.has_requests():
        engine.step()
    names = [str(i) for i in range(len(one["prompts"]))]
    return {
        "tokens": [tokens.get(name) for name in names],
        "cached": [cached.get(name) for name in names],
    }


def keep_imports_from_collections() -> None:
    """vLLM collects garbage some eight times per engine, each time through all that was imported.

    What it freezes and unfreezes itself would put that back: here its engines' objects stay in.
    """
    from vllm import LLM, SamplingParams  # noqa: F401 - all of it is imported now

    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def stop(engine) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    keep_imports_from_collections()
    jobs, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps([do(job) for job in json.loads(jobs.read_text())]))
