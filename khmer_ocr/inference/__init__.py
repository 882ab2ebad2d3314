"""Reading lines and pages, ONNX, voting"""

# made by tools/rooms.py from the notebooks of this room: do not edit
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        'reader': [
            'WINDOW',
            'OVERLAP',
            'BUCKET',
            'Prediction',
            'GreedyCTC',
            'BeamCTC',
            'Autoregressive',
            'choose_decoder',
            'Reader',
            'read_files',
            'read_colour_lines',
        ],
        'documents': [
            'open_pages',
        ],
        'deskew': [
            'dark_on_light',
            'binarise',
            'deskew_angle',
            'rotate',
        ],
        'page': [
            'Box',
            'Page',
            'straighten',
            'find_lines',
            'crop_line',
            'read_page',
            'page_text',
        ],
        'onnx': [
            'export_onnx',
            'OnnxNet',
            'OnnxReader',
            'open_reader',
            'calibration_lines',
            'quantise',
            'write_program',
        ],
        'voting': [
            'NULL',
            'Candidate',
            'split_prediction',
            'confusion_network',
            'vote_column',
            'vote',
            'FileFunctionReader',
            'Rover',
            'MeanProbabilityReader',
        ],
    },
)
