"""Ends a rank whose background writer of checkpoints has died.

Megatron asks the writer whether it is done, and would ask a dead one for ever: no save would come
to its end, and the last one would be waited for without end. What kills a writer is most often the
kernel, when the host has no memory left for its copy of the weights.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from s2megatron.cluster.orphans import end_children

INTERVAL = 1.0
"""Seconds between two looks."""


CALLERS = ("_persistent_caller", "persistent_caller")
"""Who starts the writer, by its name in Megatron's queue of saves and in nvidia-resiliency-ext's
(0.6 and 0.7: all that Megatron 0.19 takes)."""


class UnknownWriter(LookupError):
    """Megatron's queue of saves has no name for its writer that is known here."""


def current_writer() -> BaseProcess | None:
    """The persistent writer that Megatron has now; it starts another one for the last save.

    One that nvidia-resiliency-ext has started ahead is none yet: should it die before the first
    save, the package takes another.

    Raises:
        UnknownWriter: another version's names.
    """
    from megatron.training import async_utils

    queue = async_utils._async_calls_queue
    if queue is None:
        return None
    for name in CALLERS:
        if hasattr(queue, name):
            caller = getattr(queue, name)
            if caller is not None and not hasattr(caller, "process"):
                raise UnknownWriter(f"{_kind(caller)} has no 'process'")
            return caller and caller.process
    raise UnknownWriter(f"{_kind(queue)} has none of {', '.join(CALLERS)}")


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class WriterWatch:
    """A thread that looks at the writer every second.

    A thread, because the training thread may be waiting for the writer in Megatron's code, where no
    exception reaches it.
    """

    def __init__(
        self,
        fail: Callable[[str], None],
        find: Callable[[], BaseProcess | None] = current_writer,
        tell: Callable[[str], None] = print,
    ):
        """
        Args:
            fail: called once, in the thread, with what has happened.
            find: the writer now, or None; raises UnknownWriter where it cannot be found.
            tell: called once, in the thread, with why nothing is watched.
        """
        self.fail, self.find, self.tell = fail, find, tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the writer is ended on purpose by something else than Megatron's DONE."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                writer = self.find()
            except UnknownWriter as why:
                self.tell(
                    f"s2megatron: the background writer of checkpoints is not watched: {why}. "
                    "Should it die, the run would wait for it without end; "
                    "megatron.async_strategy=mcore is watched"
                )
                return
            if writer is not None and (status := writer.exitcode):
                self.fail(what_happened(writer.pid, status))
                return


def what_happened(pid: int, status: int) -> str:
    """Of a process that has ended with this status, as `multiprocessing` counts: -9 is SIGKILL."""
    how = f"with exit status {status}; its reason is above"
    if status < 0:
        how = f"killed by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += " (out of host memory? see dmesg)"
    return (
        f"the background writer of checkpoints (process {pid}) has ended, {how}: nothing more can "
        "be saved. The last complete checkpoint stays as it is"
    )


def end_rank(reason: str) -> None:
    """Ends this process as a failed rank, from any thread: its agent tells the reason."""
    get_error_handler().record_exception(RuntimeError(reason))
    print(f"s2megatron: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    end_children()
    os._exit(1)
