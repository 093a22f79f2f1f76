"""Placement groups that a killed process has left behind.

Ray ends a group when the job of its creator ends, and only then. Ray Train has a cleaner for those
of a controller that was killed, which asks a dashboard and so is of no use without one.
"""

from __future__ import annotations

from ray.util.placement_group import PlacementGroup, remove_placement_group

from saeray.actors.nodes import namespace

CREATOR = "TrainController"  # Ray Train's: once it is dead nobody has a use for its group


def end_orphaned_groups() -> int:
    """Ends the groups in this namespace of Ray Train's controllers that are dead; how many."""
    from ray._private.state import actors, state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    ended = 0
    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(data)
        if group.state == Group.REMOVED or not group.creator_actor_dead or group.is_detached:
            continue
        creator = actors(group.creator_actor_id.hex()) if group.creator_actor_id else {}
        if group.ray_namespace == namespace() and CREATOR in creator.get("ActorClassName", ""):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            ended += 1
    return ended
