"""The rooms of the house, in the order in which they may use each other: python tools/rooms.py [--check]

Writes `khmer_ocr/<room>/__init__.py`, which hands out the public names of the room's modules (lazily: a name imports
its module when it is asked for), so that `from khmer_ocr.data import OnTheFlyDataset` works. `--check` only says
whether the files are up to date."""

import ast
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
package = root / 'khmer_ocr'

ROOMS = dict(
    core='one-line errors, files that are never half-written, settings, random streams',
    text='Khmer code points, tokenizers, sources, rules, the corpus, the sampler, error rates',
    synth='fonts, shaping, degradation, and labelled line images on disk',
    training='settings, checkpoints, callbacks, and one loop for any network',
    data='from image files to batches of prepared lines',
    models='the recognisers: networks, decoding, losses, training, distillation, release',
    generative='DCGAN, Pix2Pix and VAE: learned styles of paper and ink, and how generated pages are measured',
    reporting='figures, tables, self-contained HTML pages, parameterised runs',
    inference='reading lines and pages, ONNX, voting',
    evaluation='other engines, standard sets, error analysis',
    experiments='questions that were asked once: nothing but the command imports them',
    cli='the command khmer-ocr, a module for each group of verbs',
)


def exported(module: Path) -> list[str]:
    "The names in `__all__` of a module, read without importing it"
    for node in ast.parse(module.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


def modules(room: str) -> list[Path]:
    "The modules of a room in the order of their notebooks"
    notebooks = sorted((root / 'nbs').glob(f'[0-9][0-9]_{room}/[0-9][0-9]*_*.ipynb'))
    return [package / room / f'{nb.stem.split("_", 1)[1]}.py' for nb in notebooks]


def public_names(room: str) -> dict[str, list[str]]:
    "Module -> its public names; a name that two modules export, or that is also a module's, is refused"
    names = {module.stem: exported(module) for module in modules(room)}
    seen = {}
    for module, exports in names.items():
        for name in exports:
            if name in seen:
                sys.exit(
                    f'khmer_ocr.{room}: {name} is exported by {seen[name]} and by {module}: one meaning for each name'
                )
            if name in names:
                sys.exit(f'khmer_ocr.{room}: {name} is a module and a name that {module} exports: rename one of them')
            seen[name] = module
    return names


def init_text(room: str) -> str:
    "The `__init__.py` of a room; that of the command hands out nothing, for nobody imports commands"
    title = f'{ROOMS[room][0].upper()}{ROOMS[room][1:]}'
    if room == 'cli':
        return f'"""{title}"""\n'
    lines = []
    for module, names in public_names(room).items():
        listed = ''.join(f'            {name!r},\n' for name in names)
        lines.append(f'        {module!r}: [\n{listed}        ],\n' if names else f'        {module!r}: [],\n')
    return (
        f'"""{title}"""\n\n'
        '# made by tools/rooms.py from the notebooks of this room: do not edit\n'
        'import lazy_loader\n\n'
        '__getattr__, __dir__, __all__ = lazy_loader.attach(\n'
        '    __name__,\n'
        f'    submod_attrs={{\n{"".join(lines)}    }},\n'
        ')\n'
    )


def main(check: bool):
    stale = []
    for room in ROOMS:
        path = package / room / '__init__.py'
        text = init_text(room)
        if path.exists() and path.read_text(encoding='utf-8') == text:
            continue
        stale.append(str(path.relative_to(root)))
        if not check:
            path.write_text(text, encoding='utf-8')
    if check and stale:
        sys.exit(f'not up to date: {", ".join(stale)}: run `python tools/rooms.py`')


if __name__ == '__main__':
    main('--check' in sys.argv)
