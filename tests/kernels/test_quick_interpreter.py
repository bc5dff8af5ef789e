"""What tests/support/quick_interpreter.py leaves out of Triton's interpreter, and what it keeps."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")


@triton.jit
def next_of(x):
    return x + 1


@triton.jit
def count_kernel(out, times, BLOCK: tl.constexpr):
    found = tl.zeros([BLOCK], tl.int32)
    for _ in range(times):
        found = next_of(found)
    tl.store(out + tl.arange(0, BLOCK), found)


def looks(monkeypatch, times: int) -> int:
    """How often the interpreter looks through the language while a helper is called `times`."""
    seen = []
    look = interpreter._patch_builtin
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", lambda *a: (seen.append(a), look(*a)))
        out = torch.empty(4, dtype=torch.int32)
        count_kernel[(2,)](out, times, BLOCK=4)
    assert out.tolist() == [times] * 4
    return len(seen)


def test_a_kernel_looks_through_the_language_once_however_many_helpers_it_calls(monkeypatch):
    looks(monkeypatch, 1)
    assert looks(monkeypatch, 1) == looks(monkeypatch, 50) > 0
    assert tl.core.is_builtin(tl.load)  # as it was before


def test_overflow_is_not_looked_for_where_it_would_not_be_told():
    options = interpreter.interpreter_builder.options
    assert not options.debug and not options.sanitize_overflow
