"""The picture of a user's revisions, as places and SVG paths. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from populace.population.page.reader import RevisionView


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeNode:
    """A revision's circle."""

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
    infos = [item.info for item in revisions]
    for info in reversed(infos):
        lane = lanes.get(info.parent, 0) if info.parent is not None else 0
        if ends and (lane >= len(ends) or ends[lane] != info.parent):
            lane = len(ends)
            ends.append(info.revision)
        elif ends:
            ends[lane] = info.revision
        else:
            ends.append(info.revision)
        lanes[info.revision] = lane
    places = {
        info.revision: (12 + lane_width * lanes[info.revision], 14 + row_height * row)
        for row, info in enumerate(infos)
    }
    edges = []
    for info in infos:
        if info.parent is not None and info.parent in places:
            (x, y), (parent_x, parent_y) = places[info.revision], places[info.parent]
            bend = f"L{x} {parent_y - row_height // 2} " if x != parent_x else ""
            edges.append(f"M{x} {y} {bend}L{parent_x} {parent_y}")
    nodes = []
    for item in revisions:
        x, y = places[item.info.revision]
        marks = " ".join(item.marks)
        nodes.append(TreeNode(revision=item.info.revision, marks=marks, x=x, y=y))
    text_x = 12 + lane_width * len(ends)
    return Tree(
        nodes=tuple(nodes),
        edges=tuple(edges),
        text_x=text_x,
        width=text_x + 140,
        height=28 + row_height * max(0, len(revisions) - 1),
    )
