"""What requests need compiled is compiled while vLLM starts, not while the first of them waits.

vLLM warms up with a step or two of its own making, which meet a few of the kernels. So when the
layers have their caches, every kernel is compiled that a step of this server can launch
(s2_kernels.ahead finds out which). Nothing runs, and so no memory is taken that vLLM would have to
measure.
"""

import time
from typing import TYPE_CHECKING

from s2_vllm.checks import logger

if TYPE_CHECKING:
    from s2_vllm.backend import S2Attention

_READY = set()
"""The requests that this process has the kernels for: vLLM binds small caches first, to measure."""


def get_ready(layers: "list[S2Attention]") -> None:
    """Compiles what requests need of these layers' pages, and says so in one line.

    On the CPU, where PyTorch computes, there is nothing to do.
    """
    pools = [(layer, pool) for layer in layers for pool in layer.pools if pool.k_pages.is_cuda]
    if not pools:
        return
    from s2_kernels.ahead import Requests, compile_ahead  # they need Triton

    wanted = {
        Requests(pool.pattern, layer.head_size, pool.k_pages.dtype, pool.k_pages.device,
                 layer.sequences, layer.new_tokens, layer.longest)
        for layer, pool in pools
    }  # fmt: skip
    if wanted <= _READY:
        return
    began = time.perf_counter()
    count = compile_ahead(wanted)
    _READY.update(wanted)
    logger.info("s2: %d kernels ready in %.1f s", count, time.perf_counter() - began)
