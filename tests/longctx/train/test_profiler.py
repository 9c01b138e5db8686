import pytest

from longctx.train.profiler import Profiler


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        pytest.param([1, 2], False, id="stopped before"),
        pytest.param([2, 3], True, id="stopped within"),
        pytest.param([4, 5, 6], True, id="resumed within"),
        pytest.param([6, 7], False, id="resumed behind"),
    ],
)
def test_what_a_run_does_of_the_steps_is_traced(tmp_path, steps, traced):
    profiler = Profiler(tmp_path, 3, 5)
    for step in steps:
        profiler.before(step)
        profiler.after(step, ())
    profiler.close()
    profiler.close()
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == traced
