"""The helper process of Megatron's checkpoint saves ends with the rank that started it.

Every save collects its results through a `multiprocessing` manager, a process of half a gigabyte.
Megatron 0.19 starts it so that it outlives a rank that is killed, or ends without Python's own
finalizers: each failed start then leaves one per rank behind, with the rank's standard output open.
"""

import functools
import multiprocessing
from multiprocessing.managers import SyncManager

import torch

from s2megatron.cluster.orphans import die_with_parent


@functools.cache
def tie_save_helpers() -> None:
    """Replaces how Megatron's own ("mcore") saves start their manager, once per process.

    Without a GPU the manager is forked, as the background writer is there (cpu_runtime.py): a fresh
    interpreter would import torch once more for every rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queues = []

    def results_queue(mp_mode: str = "spawn"):
        if not queues:
            mode = mp_mode if torch.cuda.is_available() else "fork"
            manager = SyncManager(ctx=multiprocessing.get_context(mode))
            manager.start(initializer=die_with_parent)
            queues.append(manager.Queue())
        return queues[0]

    filesystem_async.get_write_results_queue = results_queue
