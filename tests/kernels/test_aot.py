"""The shipped configurations, compiled for GPUs that are not there with the pinned Triton.

No spills, what fits in shared memory, the main loops as written, and no recompilation.
"""

import pytest
from shipped import ARCHITECTURES, compile_in_a_process

# Bytes of stack, KiB of shared memory, and the main loop: a second product is in flight when the
# first one is waited for. The exponentials (EX2) stand after both, when the other warpgroup has the
# tensor cores. That is what measured faster.
BACKWARD_LOOP = ["HGMMA", "WAIT 1", "EX2", "WAIT 0", "EX2", "HGMMA", "WAIT 0"]
HOPPER = dict(
    s2_hopper_forward_kernel=dict(stack=8, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]),
    s2_hopper_dkdv_kernel=dict(stack=176, shared=226.5, loop=BACKWARD_LOOP),
    s2_hopper_dq_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_forward_wide_kernel=dict(
        stack=16, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]
    ),
    s2_hopper_dq_wide_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_dkdv_wide_kernel=dict(stack=8, shared=226, loop=None),  # two, see below
)
WIDE_DKDV_LOOPS = [  # the warpgroup of dk, that of dv
    ["HGMMA", "WAIT 0", "HGMMA", "WAIT 0"],
    ["EX2", "HGMMA", "WAIT 1", "WAIT 0"],
]
HOPPER_VARIANTS = 7  # three head sizes at most, packed, float16, blocks of 128, three ranges
SHARED = {80: 99, 90: 227, 100: 99}
"""KiB a program may take: on other GPUs than Hopper, what consumer cards have."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return compile_in_a_process(tmp_path_factory.mktemp("triton"))
