"""The plan of a refresh on a GPU: everything once, within the memory, and never by timing."""

from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.optim.cusolver import better_alone, milliseconds
from algoperf_shampoo.optim.lanes import Batch, Task, plan

MIB = 2**20
tasks = st.lists(
    st.tuples(st.sampled_from([9, 128, 256, 288, 384, 512, 1000, 1024]), st.integers(1, 90)).map(
        lambda x: Task(x[0], x[1], 20 * x[0] ** 2)
    ),
    min_size=1,
    max_size=5,
)


@given(tasks, st.lists(st.integers(20, 400), min_size=1, max_size=3))
def test_every_matrix_once_and_within_the_memory(tasks, rooms):
    rooms = [room * MIB for room in rooms]
    lanes = plan(tasks, rooms)
    assert lanes == plan(tasks, rooms)
    done = []
    for room, lane in zip(rooms, lanes, strict=True):
        for batch in lane:
            task = tasks[batch.task]
            assert batch.count * task.bytes_each <= room
            assert batch.count == 1 or not better_alone(task.n, batch.count)
            done += [(batch.task, i) for i in range(batch.start, batch.start + batch.count)]
    assert sorted(done) == [(k, i) for k, task in enumerate(tasks) for i in range(task.count)]


def test_the_large_lane_takes_batches_and_the_small_one_what_is_left_over():
    """Two lanes, for ten and for two of size 1024: by hand."""
    task = Task(1024, 13, 10 * MIB)
    large, small = plan([task], [100 * MIB, 20 * MIB])
    assert large[0] == Batch(0, 0, 10)
    # 77 ms for the ten, 10.6 ms for each of the others
    assert small == [Batch(0, i, 1) for i in (10, 11, 12)]
    assert large[1:] == []
    assert milliseconds(1024, 10) > 3 * milliseconds(1024, 1)


def test_small_matrices_are_never_alone():
    (lane,) = plan([Task(128, 5, MIB)], [100 * MIB])
    assert lane == [Batch(0, 0, 5)]
