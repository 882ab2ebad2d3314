"""From image files to batches of prepared lines"""

# made by tools/rooms.py from the notebooks of this room: do not edit
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        'images': [
            'open_image',
            'read_image',
            'to_grey',
        ],
        'preprocessing': [
            'HEIGHT',
            'polarity_score',
            'subtract_background',
            'border_contrast',
            'normalise_polarity',
            'estimate_background',
            'flat_field',
            'stretch_contrast',
            'trim_box',
            'trim',
            'normalise_line',
            'line_box',
            'preprocess',
            'local_threshold',
        ],
        'batching': [
            'POOL',
            'collate',
            'as_input',
            'bucket_batches',
            'padding',
            'cut_widths',
            'pool_batches',
            'BatchPools',
        ],
        'datasets': [
            'LineSource',
            'OnTheFlyDataset',
            'read_labels',
            'LineFolder',
            'FixedSet',
            'SyntheticImageDataset',
            'SyntheticImageGenerator',
            'ShardedDataset',
            'open_lines',
            'check_labels',
        ],
        'mixing': [
            'MixedSource',
            'CurriculumStage',
            'read_stages',
            'Curriculum',
            'rescale_line',
            'MultiScale',
            'DataConfig',
            'training_source',
            'training_batches',
        ],
        'i2t': [
            'I2TDataset',
            'i2t_stats',
            'check_i2t',
            'CopiedLines',
            'DrawnLines',
            'split_lines',
            'export_i2t',
        ],
    },
)
