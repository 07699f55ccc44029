"""What transformers records of a forward by hooks that it leaves on modules, and that see nothing at other times."""

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # releases that put forwards of their own on the modules while they record
    _active_collector = None

_OF_LAYERS = {"hidden_states", "_hidden_states_layers"}


def is_recording() -> bool:
    """Whether anything is being recorded."""
    return _active_collector is not None and bool(_active_collector.get())


def is_recording_inside_layers() -> bool:
    """Whether more is being recorded than what layers return."""
    if _active_collector is None:
        return False
    collected = _active_collector.get()
    return bool(collected) and not _OF_LAYERS.issuperset(collected)
