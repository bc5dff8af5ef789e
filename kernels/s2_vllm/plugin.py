"""What vLLM calls when it starts, in every process: the models' names, and the checks."""

from s2_vllm.checks import ARCHITECTURES, OURS, check_and_set, logger
from s2_vllm.versions import too_old


def register() -> None:
    """The entry point `vllm.general_plugins`. Called twice, it does nothing more.

    vLLM keeps for each architecture a class that may look at a configuration and change it. Ours
    goes on top of each of them, because a model with an `s2` key must not be served dense whatever
    its architecture is.
    """
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known = set(ModelRegistry.get_supported_archs()) | set(MODELS_CONFIG_MAP)
    for name in known:
        below = MODELS_CONFIG_MAP.get(name)
        if not getattr(below, "checks_s2", False):
            MODELS_CONFIG_MAP[name] = _with_checks(below)
    if wrong := too_old(vllm.__version__):
        logger.warning(wrong)  # it will not know our names, and say so
        return
    for name in ARCHITECTURES:
        ModelRegistry.register_model(OURS + name, f"s2_vllm.models:{OURS}{name}")
        MODELS_CONFIG_MAP[OURS + name] = MODELS_CONFIG_MAP[name]


def _with_checks(below: type | None) -> type:
    """A class that does what `below` does, and then ours."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    below = below or VerifyAndUpdateConfig

    class ChecksS2(below):
        checks_s2 = True

        @staticmethod
        def verify_and_update_config(vllm_config) -> None:
            below.verify_and_update_config(vllm_config)
            check_and_set(vllm_config)

    return ChecksS2
