"""What of torch must go on working in a process in which the CPU takes the GPU's place."""

from in_process import call


def transforms() -> dict:
    """torch.compile's tables, made after the change, and forward-mode AD, which scripts code."""
    import torch
    from torch._dynamo import trace_rules
    from torch.autograd import forward_ad

    trace_rules.get_torch_obj_rule_map.cache_clear()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        tangent = forward_ad.unpack_dual(x * x).tangent.tolist()
    return {"known": len(trace_rules.get_torch_obj_rule_map()) > 1000, "tangent": tangent}


def test_compile_and_forward_mode_find_torchs_functions():
    assert call("test_cpu_runtime", "transforms") == {"known": True, "tangent": [2.0, 2.0]}
