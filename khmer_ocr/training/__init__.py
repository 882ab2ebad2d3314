"""Settings, checkpoints, callbacks, and one loop for any network"""

# made by tools/rooms.py from the notebooks of this room: do not edit
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        'settings': [
            'TrainConfig',
            'lr_at',
            'make_optimizer',
            'best_precision',
            'world_size',
            'free_threads',
            'freeze',
        ],
        'memory': [
            'is_out_of_memory',
            'batch_length',
            'split_batch',
            'kept_bytes',
            'free_memory',
            'auto_batch_size',
        ],
        'checkpoints': [
            'save_checkpoint',
            'upgrade_with',
            'rename_part',
            'load_checkpoint',
            'tensors_under',
            'with_prefix',
            'load_weights',
            'load_exactly',
            'ema_update',
        ],
        'callbacks': [
            'HISTORY_COLUMNS',
            'CancelFit',
            'Callback',
            'memory_mb',
            'is_due',
            'Timer',
            'write_csv',
            'read_history',
            'History',
            'Progress',
            'TensorBoard',
            'EarlyStop',
            'StopAtTarget',
            'KeepBest',
            'standard_callbacks',
            'GracefulInterrupt',
            'plot_curves',
            'plot_history',
        ],
        'learner': [
            'Learner',
        ],
    },
)
