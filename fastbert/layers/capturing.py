"""Tells whether transformers is recording outputs of the current forward, with the hooks that it leaves on modules."""

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # releases that replace modules' forwards while they record
    _active_collector = None

_OF_LAYERS = {"hidden_states", "_hidden_states_layers"}


def is_recording() -> bool:
    """Whether any output is being recorded."""
    return _active_collector is not None and bool(_active_collector.get())


def is_recording_inside_layers() -> bool:
    """Whether outputs of modules inside layers, such as attention weights, are being recorded."""
    if _active_collector is None:
        return False
    collected = _active_collector.get()
    return bool(collected) and not _OF_LAYERS.issuperset(collected)
