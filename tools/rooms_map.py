"""A drawing of the rooms and of which uses which: python tools/rooms_map.py -> docs/rooms.png

An arrow that others imply (all rooms use core) is left out, so that the picture shows the way and not the mesh."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import rooms
from matplotlib.patches import FancyBboxPatch

root = Path(__file__).resolve().parents[1]
COLOURS = dict(
    core='#e8e8e8',
    text='#dbe9f6',
    synth='#dbe9f6',
    data='#dbe9f6',
    training='#e3f1dd',
    models='#e3f1dd',
    generative='#fbe6cf',
    reporting='#efe3f4',
    inference='#f9dcdc',
    evaluation='#f9dcdc',
    experiments='#efe3f4',
    cli='#e8e8e8',
)

COLUMNS = dict(text=0, training=-1, models=-1, inference=-1, generative=0, reporting=1, evaluation=0)


def used_by(room: str) -> set[str]:
    "The other rooms whose names a room's modules import"
    used = set()
    for module in rooms.modules(room):
        for node in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level != 1:
                first = node.module.removeprefix('khmer_ocr.').split('.')[0]
                used |= {first} & set(rooms.ROOMS)
    return used - {room}


def reachable(room: str, uses: dict[str, set[str]]) -> set[str]:
    "Every room that `room` uses, directly or by way of others"
    return uses[room].union(*(reachable(other, uses) for other in uses[room]))


def levels(uses: dict[str, set[str]]) -> dict[str, int]:
    "The floor of each room: one above the highest that it uses"
    floor = {}
    for room in rooms.ROOMS:
        floor[room] = 1 + max((floor[other] for other in uses[room]), default=-1)
    return floor


def direct_arrows(uses: dict[str, set[str]]) -> list[tuple[str, str]]:
    "Arrows that no longer way implies"
    arrows = []
    for room, others in uses.items():
        implied = set().union(*(reachable(other, uses) for other in others))
        arrows += [(room, other) for other in others - implied]
    return arrows


def wrap(text: str, width: int = 31) -> str:
    "Lines of about `width` characters"
    lines = ['']
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append('')
        lines[-1] += f' {word}' if lines[-1] else word
    return '\n'.join(lines)


def draw_room(ax, room: str, x: float, y: float):
    "A box with the name of a room, how many modules it has, and what is there"
    ax.add_patch(
        FancyBboxPatch(
            (x - 1.35, y - 0.42), 2.7, 0.84, 'round,pad=0.04', fc=COLOURS[room], ec='#555555', lw=0.8, zorder=2
        )
    )
    count = len(rooms.modules(room))
    ax.text(x, y + 0.26, room, ha='center', va='center', size=11, weight='bold', zorder=3)
    ax.text(x + 1.3, y + 0.3, f'{count}', ha='right', va='center', size=7, color='#666666', zorder=3)
    ax.text(x, y - 0.12, wrap(rooms.ROOMS[room]), ha='center', va='center', size=7, linespacing=1.2, zorder=3)


def draw(path: Path):
    uses = {room: used_by(room) for room in rooms.ROOMS}
    floor = levels(uses)
    rows = {level: [room for room in rooms.ROOMS if floor[room] == level] for level in set(floor.values())}
    place = {}
    for level, row in rows.items():
        for i, room in enumerate(row):
            column = COLUMNS.get(room, i - (len(row) - 1) / 2)
            place[room] = (3.3 * column, -1.35 * level)
    fig, ax = plt.subplots(figsize=(8.5, 1.15 * len(rows)), dpi=110)
    for room, other in direct_arrows(uses):
        (x0, y0), (x1, y1) = place[room], place[other]
        style = dict(arrowstyle='-|>', color='#888888', lw=1, shrinkA=0, shrinkB=2)
        ax.annotate('', (x1, y1 - 0.46), (x0, y0 + 0.46), arrowprops=style, zorder=1)
    for room, (x, y) in place.items():
        draw_room(ax, room, x, y)
    widest = max(len(row) for row in rows.values())
    ax.set(xlim=(-1.7 * widest, 1.7 * widest), ylim=(-1.35 * max(rows) - 0.6, 0.6))
    ax.axis('off')
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, bbox_inches='tight', metadata=dict(Software=None))


if __name__ == '__main__':
    draw(root / 'docs/rooms.png')
