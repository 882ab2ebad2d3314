"""Notebooks to package: python tools/export.py

What `nbdev_export` does, with two additions: lists of public names stay within 120 columns, and each room's
`__init__.py` hands out what its modules export (tools/rooms.py)."""

from textwrap import TextWrapper

import nbdev.maker
import rooms
from nbdev.doclinks import nbdev_export

PREFIX = '__all__ = '


class Wrapper(TextWrapper):
    "Wraps the list behind `__all__ = ` so that the first line fits as well"

    def wrap(self, text):
        self.initial_indent = ' ' * len(PREFIX)
        lines = super().wrap(text)
        return [lines[0].lstrip(), *lines[1:]]


def export():
    nbdev.maker.TextWrapper = Wrapper
    nbdev_export()
    rooms.main(check=False)


if __name__ == '__main__':
    export()
