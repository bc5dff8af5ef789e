"""How a process that has done its work ends.

A thread that is inside torch's C++ while the interpreter is taken down (a data loader's, a log
writer's) is ended by CPython with `pthread_exit`, which unwinds through C++ that does not allow it:
"terminate called without an active exception", SIGABRT, after the last iteration. A finished run
that reports a failure is started again by SLURM. So the interpreter is not taken down.
"""

import atexit
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from s2megatron.cluster.orphans import end_children


def run_as_rank(main: Callable[[], int]) -> int:
    """`main`, for a process of its own: what ends it reaches its agent, and it does end.

    After a failure nothing is waited for: with a peer gone, NCCL's destructors and the join of the
    checkpoint writer can block for ever, and the job with them.

    Returns:
        What `main` returns; after an exception the process ends here, with status 1.
    """
    try:
        return record(main)() or 0  # it keeps the exit of status 0 to itself
    except Exception:  # whatever ended training: the agent reports it
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        end_children()
        os._exit(1)


def leave(status: int) -> NoReturn:
    """Ends the process as `sys.exit(status)` does, but for taking the interpreter down.

    Waits for threads that are no daemons, runs what is registered with `atexit`, and writes out
    stdout, stderr and the logs. Threads that are daemons end with the process.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
