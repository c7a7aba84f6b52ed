"""The picture of a user's revisions, as places and SVG paths. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from populace.population.page.reader import RevisionView


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeNode:
    revision: int
    marks: str
    x: int
    y: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Revisions and their parents, newest on top; a branch moves one lane to the right."""

    nodes: tuple[TreeNode, ...]
    edges: tuple[str, ...]
    """SVG paths."""
    text_x: int
    width: int
    height: int


def tree_of(revisions: Sequence[RevisionView], row_height: int = 26, lane_width: int = 22) -> Tree:
    """Places of revisions, given newest first. A revision stays in its parent's lane unless a
    sibling has it."""
    lanes: dict[int, int] = {}
    ends: list[int] = []  # the last revision of every lane
    for item in reversed(revisions):
        lane = lanes.get(item.parent, 0) if item.parent is not None else 0
        if ends and (lane >= len(ends) or ends[lane] != item.parent):
            lane = len(ends)
            ends.append(item.revision)
        elif ends:
            ends[lane] = item.revision
        else:
            ends.append(item.revision)
        lanes[item.revision] = lane
    places = {
        item.revision: (12 + lane_width * lanes[item.revision], 14 + row_height * row)
        for row, item in enumerate(revisions)
    }
    edges = []
    for item in revisions:
        if item.parent is not None and item.parent in places:
            (x, y), (parent_x, parent_y) = places[item.revision], places[item.parent]
            bend = f"L{x} {parent_y - row_height // 2} " if x != parent_x else ""
            edges.append(f"M{x} {y} {bend}L{parent_x} {parent_y}")
    nodes = []
    for item in revisions:
        x, y = places[item.revision]
        nodes.append(TreeNode(revision=item.revision, marks=" ".join(item.marks), x=x, y=y))
    text_x = 12 + lane_width * len(ends)
    return Tree(
        nodes=tuple(nodes),
        edges=tuple(edges),
        text_x=text_x,
        width=text_x + 140,
        height=28 + row_height * max(0, len(revisions) - 1),
    )
