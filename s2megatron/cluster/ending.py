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
from typing import NoReturn


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
