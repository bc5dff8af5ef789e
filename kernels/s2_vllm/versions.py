"""Which releases of vLLM the plugin was tried with."""

from s2_kernels.versions import release

OLDEST = (0, 26)
TRIED = ("0.26.0",)


def too_old(version: str) -> str | None:
    """Why a release of vLLM cannot serve S2 models, and the way out; None where it can."""
    if release(version) >= OLDEST:
        return None
    return (
        f"vllm {version} is installed: before {OLDEST[0]}.{OLDEST[1]} its cache has no place for "
        f"pages per KV head; pip install vllm=={TRIED[-1]}"
    )


def not_tried(version: str) -> str | None:
    """What to say of a release that was not tried; None of one that was."""
    if release(version) in map(release, TRIED):
        return None
    return (
        f"vllm {version} is installed, and S2 models were served with {', '.join(TRIED)} only; if "
        f"something fails, pip install vllm=={TRIED[-1]}"
    )
