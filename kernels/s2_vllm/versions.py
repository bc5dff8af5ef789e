"""Which releases of vLLM the plugin serves with."""

from s2_kernels.versions import release

OLDEST, NEWEST = (0, 26), (0, 33)
PINNED = "0.26.0"


def too_old(version: str) -> str | None:
    """Why a release of vLLM cannot serve S2 models, and the way out; None where it can."""
    if release(version) >= OLDEST:
        return None
    return (
        f"vllm {version} is installed: before {_text(OLDEST)} its cache has no place for pages per "
        f"KV head; pip install vllm=={PINNED}"
    )


def too_new(version: str) -> str | None:
    """What to say of a release after the newest that was tried; None of one that is not."""
    if release(version) <= NEWEST:
        return None
    return (
        f"vllm {version} is installed, and S2 models were served with {_text(OLDEST)} to "
        f"{_text(NEWEST)} only; if something fails, pip install vllm=={PINNED}"
    )


def _text(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
