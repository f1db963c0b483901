"""The plan of a refresh on a GPU: everything once, within the memory, and never by timing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.optim.eigen.batch_plan import LARGE, Batch, Room, Task, plan, schedule
from algoperf_shampoo.optim.eigen.cusolver import better_alone, milliseconds

MIB = 2**20
SIZES = [9, 128, 256, 288, 384, 512, 768, 1000, 1024]
# What cuSOLVER asks for, in MiB per matrix.
WORKSPACE = {384: 3.063, 512: 4.751, 768: 9.6, 1000: 15.9, 1024: 16.622}

tasks = st.lists(
    st.tuples(st.sampled_from(SIZES), st.integers(1, 90)).map(
        lambda x: Task(x[0], x[1], 20 * x[0] ** 2)
    ),
    min_size=1,
    max_size=5,
)
LARGEST = 20 * 1024**2


def batches_of(queues):
    return [(queue, batch) for queue, batches in enumerate(queues) for batch in batches]


def assert_everything_once(tasks, batches):
    done = [(b.task, i) for _, b in batches for i in range(b.start, b.start + b.count)]
    assert sorted(done) == [(k, i) for k, task in enumerate(tasks) for i in range(task.count)]


@given(tasks, st.lists(st.integers(0, 400), min_size=1, max_size=4))
def test_every_matrix_once_and_within_the_memory(tasks, rooms):
    rooms = [room * MIB for room in rooms]
    if max(rooms) < max(task.bytes_each for task in tasks):
        with pytest.raises(ValueError, match="largest size"):
            plan(tasks, rooms)
        return
    found = plan(tasks, rooms)
    assert found == plan(tasks, rooms)
    batches = batches_of(found.queues)
    assert_everything_once(tasks, batches)
    for queue, batch in batches:
        task = tasks[batch.task]
        assert batch.count * task.bytes_each <= rooms[queue]
        assert batch.count == 1 or not better_alone(task.n, batch.count)
    for queue in found.queues:
        alone = sum(milliseconds(tasks[b.task].n, b.count) for b in queue)
        assert alone <= found.milliseconds * (1 + 1e-9)


@given(tasks, st.floats(0, 500))
def test_a_plan_keeps_its_time_limit(tasks, limit):
    unlimited = plan(tasks, [400 * MIB, 40 * MIB])
    found = plan(tasks, [400 * MIB, 40 * MIB], limit)
    if found is None:
        assert unlimited.milliseconds >= limit
    else:
        assert found.milliseconds < limit


rooms = st.tuples(st.integers(0, 400), st.integers(0, 400)).map(
    lambda x: Room(max(x) * MIB, min(x) * MIB)
)


@given(tasks, st.lists(rooms, max_size=2), st.integers(1, 80), st.data())
def test_a_schedule_uses_only_memory_that_is_idle(tasks, borrowed, workspace, data):
    idle = tuple(data.draw(st.integers(0, 4 * task.n**2 * task.count)) for task in tasks)
    arguments = tuple(tasks), idle, tuple(borrowed), workspace * MIB
    found = schedule(*arguments)
    assert found == schedule.__wrapped__(*arguments)
    batches = [
        (number, queue, batch)
        for number, phase in enumerate(found.phases)
        for queue, batch in batches_of(phase.queues)
    ]
    assert_everything_once(tasks, [rest for _, *rest in batches])
    phase_of = {batch.task: number for number, _, batch in batches}
    for number, queue, batch in batches:
        assert phase_of[batch.task] == number  # a task is never spread over two
        assert batch.count * tasks[batch.task].bytes_each <= found.used[queue]
        if queue > len(borrowed):  # operators of a task that comes later
            assert phase_of[queue - 1 - len(borrowed)] > number
    if len(found.phases) == 2:
        assert all((task.n > LARGE) == (phase_of[k] == 0) for k, task in enumerate(tasks))
    own, *others = found.used
    largest = max(task.bytes_each for task in tasks)
    assert own <= max(workspace * MIB, largest)
    if max([room.bytes for room in borrowed], default=0) >= largest:
        assert own <= workspace * MIB
    for used, available in zip(others, [*(room.bytes for room in borrowed), *idle], strict=True):
        assert used <= available


def test_the_large_lane_takes_batches_and_the_small_one_what_is_left_over():
    """Two queues, for ten and for two of size 1024: by hand."""
    task = Task(1024, 13, 10 * MIB)
    large, small = plan([task], [100 * MIB, 20 * MIB]).queues
    assert large == (Batch(0, 0, 10),)
    # 81 ms for the ten, 10.6 ms for each of the others
    assert small == tuple(Batch(0, i, 1) for i in (10, 11, 12))
    assert milliseconds(1024, 10) > 3 * milliseconds(1024, 1)


def test_a_lane_too_small_for_batches_takes_single_ones():
    """Though it has room for a batch of smaller ones."""
    both = [Task(384, 110, 3 * MIB), Task(1024, 30, 16 * MIB)]
    large, small = plan(both, [340 * MIB, 40 * MIB]).queues
    assert large[0] == Batch(1, 0, 21)
    assert small[:9] == tuple(Batch(1, 21 + i, 1) for i in range(9))


def test_a_lane_that_hardly_helps_does_nothing():
    """Single matrices beside batches of 110 would save less than a twentieth."""
    large, small = plan([Task(384, 260, 3 * MIB)], [337 * MIB, 8 * MIB]).queues
    assert [b.count for b in large] == [112, 112, 36] and small == ()


def test_small_matrices_are_never_alone():
    assert plan([Task(128, 5, MIB)], [100 * MIB]).queues == ((Batch(0, 0, 5),),)


VIT = {384: 260, 512: 36, 1024: 36, 1000: 2, 768: 1}


def vit_tasks():
    return tuple(Task(n, count, int(WORKSPACE[n] * MIB)) for n, count in VIT.items())


def test_the_large_factors_of_a_vit_fill_the_memory_of_the_others():
    """ViT S/16: gradients, scratch and moments are borrowed, and 384's and 512's operators idle."""
    tasks = vit_tasks()
    idle = tuple(4 * t.n**2 * t.count for t in tasks)
    found = schedule(tasks, idle, (Room(337 * MIB, 337 * MIB // 2),), 8 * MIB)
    first, second = found.phases
    own, arena, of_384, of_512, *rest = first.queues
    assert own == () and not any(rest)
    assert [b.count for b in arena if tasks[b.task].n == 1024] == [20]
    assert [b.count for b in of_384 if tasks[b.task].n == 1024] == [8]
    assert [b.count for b in of_512 if tasks[b.task].n == 1024] == [1] * 8
    ends = [
        sum(milliseconds(tasks[b.task].n, b.count) for b in queue) for queue in first.queues[1:4]
    ]
    assert max(ends) < 1.15 * min(ends)
    assert first.milliseconds == pytest.approx(100, rel=0.15)
    assert [b.count for b in second.queues[1] if tasks[b.task].n == 384] == [110, 110, 40]
    assert found.used[0] == 0  # nothing is taken anew
    alone = sum(milliseconds(t.n, t.count) for t in tasks)
    assert first.milliseconds + second.milliseconds < 1.15 * alone


def test_what_is_parked_is_worth_its_time():
    """To the host and back take 9 ms for 150 MiB: many small matrices go in two batches instead."""
    borrowed = (Room(300 * MIB, 150 * MIB),)
    assert schedule((Task(384, 20, 3 * MIB),), (0,), borrowed, MIB).used[1] == 60 * MIB
    assert schedule((Task(384, 90, 3 * MIB),), (0,), borrowed, MIB).used[1] == 270 * MIB
    assert schedule((Task(64, 600, MIB // 2),), (0,), borrowed, MIB).used[1] == 150 * MIB


def test_the_workspace_grows_only_where_nothing_holds_the_largest():
    small = Task(384, 20, 3 * MIB), Task(1024, 1, 17 * MIB)
    assert schedule(small, (0, 0), (), 8 * MIB).used[0] == 17 * MIB
    assert schedule(small, (0, 18 * MIB), (), 8 * MIB).used[0] == 17 * MIB  # its own operators
    assert schedule(small, (18 * MIB, 0), (), 8 * MIB).used[0] <= 8 * MIB
