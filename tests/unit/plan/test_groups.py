import pytest

from galvatron.plan.axes import StageAxes, divisors
from galvatron.plan.groups import group_shapes, groups_of, p2p_strides


@pytest.mark.parametrize(
    ("world_size", "shapes", "strides"),
    [
        (1, (), ()),
        (2, ((2, 1),), (1,)),
        (4, ((2, 1), (2, 2), (4, 1)), (1, 2)),
        (6, ((2, 1), (3, 1), (3, 2), (6, 1)), (1, 2, 3)),
        (8, ((2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)), (1, 2, 4)),
    ],
)
def test_shapes_of_small_worlds(world_size, shapes, strides):
    assert group_shapes(world_size) == shapes
    assert p2p_strides(world_size) == strides


@pytest.mark.parametrize("world_size", [2, 4, 6, 8, 12, 24])
def test_every_group_of_every_stage_is_measured(world_size):
    for stage_size in divisors(world_size):
        axes = StageAxes(stage_size)
        for inner in axes.degrees:
            for outer in (degree for degree in axes.degrees if degree > inner):
                shape = (outer // inner, inner)
                assert shape in group_shapes(world_size)
                measured = set(groups_of(world_size, *shape))
                for start in range(0, world_size, stage_size):
                    for group in axes.groups(inner, outer):
                        assert tuple(start + rank for rank in group) in measured


@pytest.mark.parametrize("world_size", [2, 4, 6, 8, 12])
def test_groups_of_a_shape_tile_the_world(world_size):
    for size, stride in group_shapes(world_size):
        members = sorted(rank for group in groups_of(world_size, size, stride) for rank in group)
        assert members == list(range(world_size))
