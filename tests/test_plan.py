"""How a layer is shared among threads: the plan is a pure function, checked here for any sizes without running one."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks import probes

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=40)


def batch_sizes(lengths: list[int]) -> list[int]:
    return [sum(length > t for length in lengths) for t in range(max(lengths))]


def plan(batch_sizes, I=64, H=64, directions=1, gates=4, lanes=8, threads=2):
    return probes.plan(batch_sizes, I, H, directions, gates, lanes, threads)


@given(lengths, st.integers(1, 300), st.integers(1, 2), st.sampled_from([2, 4, 8, 16]), st.integers(1, 300))
def test_plan_uses_threads_it_has_and_cuts_the_batch_into_slices(lengths, H, directions, lanes, threads):
    result = plan(batch_sizes(lengths), H=H, directions=directions, lanes=lanes, threads=threads)
    assert 1 <= result["teams"] * result["members"] <= max(1, min(threads, 256))
    assert result["members"] <= -(-H // lanes)  # every member owns at least one vector of units
    bounds = result["bounds"]
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and len(bounds) == result["slices"] + 1
    assert all(low < high for low, high in zip(bounds, bounds[1:], strict=False))  # no slice is empty


@given(st.integers(2, 64), st.integers(2, 8))
def test_slices_of_a_ragged_batch_have_nearly_equal_sums_of_lengths(batch, threads):
    own = sorted((10 + 17 * b % 91 for b in range(batch * threads)), reverse=True)
    result = plan(batch_sizes(own), I=256, threads=threads)
    assert result["slices"] == threads
    sums = [sum(own[low:high]) for low, high in zip(result["bounds"], result["bounds"][1:], strict=False)]
    assert max(sums) - min(sums) <= 2 * max(own)


def test_slices_of_equal_lengths_are_equal_parts():
    assert plan([13] * 7, I=256, H=64, threads=4)["bounds"] == [0, 3, 6, 9, 13]


@given(*[st.integers(1, 400)] * 3, st.integers(1, 4), st.integers(1, 9), st.integers(1, 64))
def test_pipelines_are_for_small_stacks_and_several_threads(T, B, H, gates, layers, threads):
    steps = probes.pipeline_steps(T, B, H, gates, 8, layers, threads)
    alone = plan([B] * T, I=H, H=H, gates=gates, threads=threads)
    busy = alone["teams"] * alone["members"]
    if layers == 1 or threads == 1 or T < 16 or B * gates * 2 * H * H > 2**16 or busy > min(layers, threads):
        assert steps == 0
    else:
        assert 8 <= steps <= 32 and 2 * steps <= T


def test_a_batch_that_keeps_all_threads_busy_is_no_pipeline():
    assert probes.pipeline_steps(1000, 8, 16, 4, 8, 2, 2) > 0
    assert probes.pipeline_steps(1000, 8, 16, 4, 8, 2, 8) == 0  # eight slices of the batch, two layers
    assert probes.pipeline_steps(1000, 1, 16, 4, 8, 2, 8) > 0


def test_rules_by_size():
    assert plan([32] * 100, I=128, H=64) == {"teams": 2, "members": 1, "slices": 2, "bounds": [0, 16, 32]}
    assert plan([1] * 100, I=512, H=512) == {"teams": 1, "members": 2, "slices": 1, "bounds": [0, 1]}
    # Directions side by side, whatever their size: no barrier between threads.
    assert plan([1] * 100, I=512, H=512, directions=2) == {"teams": 2, "members": 1, "slices": 1, "bounds": [0, 1]}
    assert plan([1] * 100, I=512, H=512, directions=2, threads=4)["members"] == 2
    # Too little work in a step for a meeting of two.
    assert plan([1] * 100, I=64, H=64, gates=1)["members"] == 1 and plan([1] * 100, I=64, H=64)["members"] == 2
    # Many threads: slices of the batch, each with a team; or fewer threads than there are, where meetings cost more.
    many = plan([64] * 50, I=256, H=256, threads=64)
    assert (many["teams"], many["members"], many["slices"]) == (16, 4, 16)
    assert plan([1] * 100, I=256, H=256, threads=64)["members"] == 8
    # A slice has three samples where W_hh stays in the second-level cache, else four, up to H = 64 any number.
    assert plan([6] * 100, I=128, H=128)["slices"] == 2 and plan([5] * 100, I=128, H=128)["members"] == 2
    assert plan([6] * 100, I=129, H=129)["members"] == 2 and plan([8] * 100, I=129, H=129)["slices"] == 2
    assert plan([6] * 100, I=147, H=147, gates=3)["slices"] == 2
    assert plan([6] * 100, I=256, H=256, gates=1)["slices"] == 2
    assert plan([8] * 100, I=257, H=257, gates=1)["members"] == 2
    assert plan([2] * 100, I=64, H=64)["slices"] == 2 and plan([2] * 100, I=65, H=65)["members"] == 2
    # Too little work to wake a second thread.
    assert plan([1], I=16, H=16) == {"teams": 1, "members": 1, "slices": 1, "bounds": [0, 1]}
