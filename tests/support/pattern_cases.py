"""Random patterns for hypothesis, of every kind that `ranges` makes."""

from hypothesis import settings
from hypothesis import strategies as st

from s2_kernels import ranges

settings.register_profile("s2", deadline=None, max_examples=60)
settings.load_profile("s2")


@st.composite
def head_counts(draw):
    kv_heads = draw(st.integers(1, 8))
    return kv_heads * draw(st.integers(1, 4)), kv_heads


@st.composite
def any_pattern(draw):
    heads, kv_heads = draw(head_counts())
    block_size = draw(st.sampled_from([16, 32, 64]))
    reach, stride = draw(st.integers(1, 5)), 1
    bands = [(reach, 1)]
    for _ in range(draw(st.integers(0, 2))):
        reach, stride = reach + draw(st.integers(1, 6)), stride * draw(st.integers(1, 4))
        bands.append((reach, stride))
    if draw(st.booleans()):
        factors = draw(st.lists(st.integers(1, 3), min_size=kv_heads, max_size=kv_heads))
        bands.append((None, [stride * f for f in factors]))
    return ranges(
        heads=heads,
        kv_heads=kv_heads,
        block_size=block_size,
        bands=bands,
        head_offset=draw(st.integers(0, 40)),
        head_step=draw(st.none() | st.integers(0, 5)),
        homogeneous=draw(st.booleans()),
        dense_heads=draw(st.integers(0, kv_heads)),
    )
