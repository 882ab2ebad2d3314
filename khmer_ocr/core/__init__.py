"""One-line errors, files that are never half-written, settings, random streams"""

# made by tools/rooms.py from the notebooks of this room: do not edit
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        'errors': [
            'KhmerOCRError',
            'suggest',
        ],
        'files': [
            'write_atomic',
            'block_signals',
        ],
        'config': [
            'read_settings',
            'configure',
        ],
    },
)
