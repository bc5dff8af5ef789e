"""Which releases of torch and Triton the kernels were compiled and run with.

The bounds stand in kernels/pyproject.toml as well; docs/install.md has the table of what was tried.
An environment may hold others all the same (`--no-deps`, a container). Then `import s2_kernels`
says so, and the Triton backends raise a ValueError instead of failing to compile; "blocked" and
"reference" are plain PyTorch and go on working.
"""

import importlib.util
import re
import warnings

import torch

TORCH = ((2, 10), (2, 15))
TRITON = ((3, 6), (3, 10))
"""The lowest release taken, and the lowest that is not: (major, minor)."""


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version: (2, 11) of "2.11.0a0+nv25.12"."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def outside(package: str, version: str, bounds: tuple) -> str | None:
    """What is wrong with a version, and the way out; None where it lies within the bounds."""
    low, beyond = bounds
    if low <= release(version) < beyond:
        return None
    wanted = f">={low[0]}.{low[1]},<{beyond[0]}.{beyond[1]}"
    return (
        f"{package} {version} is installed, and the S2 kernels were tried with {package}{wanted} "
        f"only: pip install '{package}{wanted}'"
    )


def installed_triton() -> str | None:
    """The Triton of this environment, None where there is none: only Linux has it."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def prepares_launches(version: str | None) -> bool:
    """Whether plans.py knows how this Triton starts a compiled kernel; else Triton is asked."""
    return version is not None and release(version) == (3, 6)


def why_no_triton(version: str | None) -> str | None:
    """What keeps a Triton, or None, from running the kernels; None where it runs them."""
    return "triton is not installed" if version is None else outside("triton", version, TRITON)


def check_versions(torch_version: str, triton_version: str | None) -> None:
    """Says at import which of these versions was not tried; a missing Triton is not mentioned.

    Raises:
        ImportError: torch is older than the oldest that was tried.
    """
    wrong = outside("torch", torch_version, TORCH)
    if wrong and release(torch_version) < TORCH[0]:
        raise ImportError(wrong)
    if wrong:
        warnings.warn(wrong, stacklevel=2)
    wrong = triton_version and outside("triton", triton_version, TRITON)
    if wrong:
        warnings.warn(
            f"{wrong}. Until then backends 'triton', 'hopper', and 'auto' on a GPU raise an error; "
            "'blocked' and 'reference' work",
            stacklevel=2,
        )


NO_TRITON = why_no_triton(installed_triton())
"""What keeps the Triton kernels from running here, whatever the inputs; None if nothing does."""
check_versions(torch.__version__, installed_triton())
