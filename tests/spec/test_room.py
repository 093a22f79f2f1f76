"""What is left of the nodes as needs are placed on them."""

from saeray.spec.room import Node, Room, need

NODES = tuple(Node(f"n{i}", {"CPU": 2}, id=f"id{i}") for i in range(2))


def test_room_without_what_is_held_of_a_node_that_is_known():
    room = Room((*NODES, Node("more", {"CPU": 8}, planned=True)))
    room.take("id1", need(1.5, 0, {}, {}))
    room.take("gone", need(1, 0, {}, {}))
    left = room.left()
    assert [n.cpus for n in left.nodes] == [2, 0.5]
    assert [n.cpus for n in left.planned] == [8]
    room.take("id1", need(1.5, 0, {}, {}))
    assert [n.cpus for n in room.left().nodes] == [2, 0]
    assert [n.cpus for n in left.nodes] == [2, 0.5]


def test_room_takes_the_tightest_node_and_nothing_when_it_only_counts():
    room = Room((Node("n0", {"CPU": 4}), Node("n1", {"CPU": 2})))
    one = need(1, 0, {}, {})
    assert room.how_many(one, 100) == 6
    assert room.place(one).name == "n1"
    assert room.how_many(one, 100) == 5
