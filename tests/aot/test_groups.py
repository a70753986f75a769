"""Notations of replica groups, and the mesh axes, links and times of groups."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aimv2_jax.aot.interconnect import Layout, groups_of
from aimv2_jax.parallel.hardware import CHIPS
from tests.aot.modules import milliseconds, row_groups, square

ROWS = tuple(tuple(range(4 * row, 4 * row + 4)) for row in range(4))
COLUMNS = tuple(tuple(range(column, 16, 4)) for column in range(4))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        (f"replica_groups={row_groups()}, use_global_device_ids=true", ROWS),
        ("replica_groups=[4,4]<=[16]", ROWS),
        ("replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}", COLUMNS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", ROWS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", COLUMNS),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}", (tuple(range(16)),)),
        ("replica_groups=mesh['a'=16] {'a':(4)4}", ROWS),
        ("replica_groups=mesh['a'=16] {'a':(1)4}", COLUMNS),
        ("replica_groups={}, to_apply=%sum", (tuple(range(16)),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_when_written_in_any_notation_then_the_same_devices(written, groups):
    assert groups_of(f", channel_id=3, {written}", 16) == groups


def test_groups_when_the_notation_is_new_then_it_is_not_guessed():
    with pytest.raises(ValueError, match="not known"):
        groups_of("replica_groups=hypercube<4>", 16)


def test_axes_when_groups_are_rows_columns_all_or_halves_then_named_so():
    layout = square()
    assert layout.axes_of(ROWS) == ("fsdp",)
    assert layout.axes_of(COLUMNS) == ("data",)
    assert layout.axes_of((tuple(range(16)),)) == ("data", "fsdp")
    assert layout.axes_of(((0, 1), (2, 3))) == ("part of fsdp",)
    assert layout.axes_of(((0, 1), (1, 2)), pairs=True) == ("fsdp",)


@pytest.mark.parametrize(
    ("kind", "groups", "ring_size", "ms"),
    [
        ("all-gather", ROWS, 4, milliseconds(8e6, links=2)),  # A ring: both directions.
        ("all-gather", ROWS, 16, milliseconds(8e6, links=1)),  # No wrap-around: a line.
        ("reduce-scatter", COLUMNS, 4, milliseconds(8e6, links=2)),
        ("all-reduce", ROWS, 4, 2 * milliseconds(8e6, links=2)),
        ("all-gather", (tuple(range(16)),), 4, 8 * 15 / 16 / 4),  # Two rings, four links, 8 MB.
        ("all-to-all", ROWS, 4, 8 / 2),  # Half of the bytes on one link: 4 devices / 8.
        ("collective-permute", ((0, 1), (1, 2), (2, 3), (3, 0)), 4, 8.0),  # A link in one direction.
        ("collective-permute", ((0, 1), (1, 2), (2, 3), (3, 0)), 16, 24.0),  # The last goes back three hops.
    ],
)
def test_time_when_eight_megabytes_at_a_gigabyte_a_second_then_as_counted_by_hand(kind, groups, ring_size, ms):
    assert square(ring_size=ring_size).route(kind, 8_000_000, groups).seconds * 1e3 == pytest.approx(ms)


def test_links_when_permutes_go_opposite_ways_then_they_do_not_share():
    layout = square()
    forward = layout.route("collective-permute", 1, ((0, 1), (1, 2), (2, 3), (3, 0)))
    backward = layout.route("collective-permute", 1, ((0, 3), (3, 2), (2, 1), (1, 0)))
    assert forward.links == {"1+"} and backward.links == {"1-"}
    assert layout.route("all-gather", 1, ROWS).links == {"1+", "1-"}


def test_time_between_slices_when_three_then_four_thirds_of_the_bytes_at_the_networks_rate():
    assert square(num_slices=3).between_slices(10**8).seconds == pytest.approx(4 / 3)


# Eight devices on a ring of four chips, at 1 GB/s a link and 6 GB/s within a chip; fsdp is the place in the chip.
PAIRS = Layout(
    ("data", "fsdp"),
    (4, 2),
    np.array([(chip, place) for chip in range(4) for place in range(2)]),
    (4,),
    1,
    dataclasses.replace(CHIPS["v7x"], link_bytes_per_s=1e9, die_bytes_per_s=6e9),
)
WITHIN, ACROSS = ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("kind", "groups", "ms", "links"),
    [
        ("all-gather", WITHIN, 8 / 2 / 6, {"die"}),
        ("all-to-all", WITHIN, 8 / 2 / 6, {"die"}),
        ("all-reduce", ACROSS, 2 * 8 * 3 / 4 / (2 / 2), {"0+", "0-"}),  # Both groups share the ring's two links.
        ("all-gather", (tuple(range(8)),), 8 * 7 / 8 / 2, {"0+", "0-", "die"}),
        ("collective-permute", ((0, 1), (1, 0)), 8 / 6, {"die"}),
        ("collective-permute", ((0, 2), (1, 3)), 2 * 8, {"0+"}),  # Both devices of a chip send over one link.
    ],
)
def test_time_when_a_chip_is_two_devices(kind, groups, ms, links):
    """They share the chip's links, and have a connection of their own."""
    route = PAIRS.route(kind, 8_000_000, groups)
    assert route.seconds * 1e3 == pytest.approx(ms) and route.links == links
