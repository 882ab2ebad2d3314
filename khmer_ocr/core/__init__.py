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
            'write_error',
            'make_folder',
            'open_atomic',
            'write_atomic',
            'folder_lock',
            'block_signals',
            'package_folder',
            'project_root',
            'shipped_manifest',
        ],
        'config': [
            'read_settings',
            'check_names',
            'check_types',
            'with_current_names',
            'lists_to_tuples',
            'configure',
            'setting_error',
            'check_ranges',
            'check_choices',
            'check_at_least',
            'check_below',
            'check_above',
            'normalised_by',
        ],
        'rng': [
            'Stream',
            'stream_rng',
            'text_hash',
            'named_rng',
        ],
        'packages': [
            'FetchError',
            'error_line',
            'find_program',
            'run_client',
            'download',
            'read_archive',
        ],
    },
)
