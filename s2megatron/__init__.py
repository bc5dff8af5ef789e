"""S2 attention for pretraining with Megatron-LM.

Megatron's --spec turns an ImportError into a dense model, and a misspelt module of this package is
one. So where the command line has a --spec, what is not found here is a RuntimeError.
"""

import sys


class _NoSuchModule:
    """The last finder asked: raises for modules of this package that no other one found."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            raise RuntimeError(
                f"--spec: there is no module {name}; write --spec s2megatron.layer_spec "
                "s2_layer_spec. Megatron would go on with dense attention, so this run stops here"
            )


if any(word.partition("=")[0] == "--spec" for word in sys.argv):
    sys.meta_path.append(_NoSuchModule)
