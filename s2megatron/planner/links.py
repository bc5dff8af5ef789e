"""What communication takes: collectives and sends over the machine's two kinds of links."""

from dataclasses import dataclass

from s2megatron.machine import Link, Machine


@dataclass
class Axis:
    """One axis' communication of a rank in a step."""

    size: int
    bytes: float = 0.0
    """Sent by this rank."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Not hidden behind computation."""

    def add(self, part: "Transfer | Axis", times: float = 1.0) -> None:
        self.bytes += times * part.bytes
        self.seconds += times * part.seconds
        self.exposed += times * part.exposed


@dataclass(frozen=True)
class Transfer:
    """One axis' communication in one pass of a layer, for one micro-batch."""

    bytes: float = 0.0
    """Sent by the busiest rank (received, where that is more)."""
    seconds: float = 0.0
    exposed: float = 0.0

    @classmethod
    def waited_for(cls, size: float, seconds: float) -> "Transfer":
        """Nothing hides it."""
        return cls(size, seconds, seconds)


def gather_seconds(
    machine: Machine, size: float, ranks: int, *, stride: int
) -> tuple[float, float]:
    """An all-gather or reduce-scatter of `size` bytes in all over ranks `stride` apart.

    Members of a group that share a node use that many network adapters at once, as NCCL's rings do.

    Returns:
        (seconds, bytes that a rank sends).
    """
    sent = size * (ranks - 1) / ranks
    return _seconds(machine, sent, ranks, stride, adapters=_together(machine, ranks, stride)), sent


def all_to_all_seconds(machine: Machine, sent: float, ranks: int, *, stride: int) -> float:
    """An all-to-all in which the busiest rank sends (or receives) `sent` bytes to the others.

    Across nodes everything is counted as going through the rank's own adapter.
    """
    return _seconds(machine, sent, ranks, stride, adapters=1)


def hop_seconds(machine: Machine, sent: float, ranks: int, *, stride: int) -> float:
    """One step of a ring of sends; the slowest neighbours' link decides."""
    link = machine.node if _together(machine, ranks, stride) == ranks else machine.cluster
    return link.seconds(sent) + link.latency_us * 1e-6


def _together(machine: Machine, ranks: int, stride: int) -> int:
    """Members of a group that share a node."""
    return max(1, min(ranks, machine.gpus_per_node // stride))


def _seconds(machine: Machine, sent: float, ranks: int, stride: int, adapters: int) -> float:
    if ranks == 1:
        return 0.0
    link: Link = machine.node
    rate = machine.node.gb_s
    if ranks > _together(machine, ranks, stride):
        link = machine.cluster
        rate = min(rate, adapters * machine.cluster.gb_s)
    doublings = (ranks - 1).bit_length()
    return sent / (rate * 1e9) + link.latency_us * 1e-6 * doublings
