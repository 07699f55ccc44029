"""A layer that is one op: what has to be noticed of the modules inside it, and what its call has to refuse."""

from functools import partial

from tests.mutation.fault import Fault

CHANGES = "tests/models/test_layer.py"
CALLS = "tests/models/test_layer_calls.py"
MASKS_GIVEN = "tests/models/test_masks_given.py"
VERIFY = "tests/test_verify.py"

_state = partial(Fault, file="fastbert/layers/layer_state.py")
_layer = partial(Fault, file="fastbert/layers/layer.py")
_masks = partial(Fault, file="fastbert/layers/masks.py")
_verify = partial(Fault, file="fastbert/verify.py")


def _change(name: str) -> tuple[str, ...]:
    return (f"{CHANGES}::test_a_change_is_noticed_and_its_end[{name}]",)


FAULTS = (
    _state(
        "the op keeps using a replaced module",
        before='all([own["_modules"] == known for own, known in self._children])',
        after="True",
        tests=_change("unsupported: subclass of Linear"),
    ),
    _state(
        "the op keeps using a module's replaced dict",
        before="            and all(map(is_, map(vars, self._modules), self._dicts))\n",
        after="",
        tests=_change("supported: a new dict"),
    ),
    _state(
        "the op still runs after a module got another class",
        before="            and list(map(type, self._modules)) == self._types\n",
        after="",
        tests=_change("unsupported: orthogonal"),
    ),
    _state(
        "a hook that was added after a call never fires",
        before="            and self._hooks() == self._known_hooks\n",
        after="",
        tests=(f"{CHANGES}::test_a_hook_inside_fires[forward]",),
    ),
    _state(
        "a hook in a dict that is not the one of the first call never fires",
        before="list(filter(None, chain.from_iterable(map(_HOOKS, self._dicts))))",
        after="list(filter(None, self.__dict__.setdefault('first', [h for own in self._dicts for h in _HOOKS(own)])))",
        tests=(f"{CHANGES}::test_a_hook_in_a_new_dict_fires[forward]",),
    ),
    _state(
        "parameters are read from the dict of the first call",
        before="self._with_parameters = [vars(inside[name]) for name in order]",
        after="self._with_parameters = [dict(vars(inside[name])) for name in order]",
        tests=_change("supported: parameters in a new dict"),
    ),
    Fault(
        "a change that a hook makes in the next layer is not noticed",
        file="fastbert/layers/masks.py",
        before="others = others or has_hooks or prepared is None or prepared.context is None",
        after="others = False",
        tests=("tests/models/test_layer_calls.py::test_a_hook_changes_the_next_layer[parameter-a hook inside]",),
    ),
    Fault(
        "a user's encoder gets a KernelMask",
        file="fastbert/layers/masks.py",
        before='part_of(type(encoder)).part != "Encoder" or ',
        after="",
        tests=("tests/models/test_layer_calls.py::test_an_encoder_of_somebodys_own",),
    ),
    Fault(
        "a layer's state is copied with it",
        file="fastbert/layers/layer.py",
        before="return without_state(vars(self))",
        after="return vars(self)",
        tests=("tests/models/test_layer_calls.py::test_a_copy_is_its_own[pickle]",),
    ),
    Fault(
        "a GELU that calls another function still counts as GELU",
        file="fastbert/layers/parts.py",
        before="kernel if kernel is None or _acts_as_made(function, kernel) else None",
        after="kernel",
        tests=_change("unsupported: GELUActivation's function"),
    ),
    _state(
        "a forward that was set on a module after a call is not called",
        before="            and self._own_forwards() == self._known_own_forwards\n",
        after="",
        tests=_change("unsupported: own forward of a Linear"),
    ),
    _state(
        "a forward that was set on a class after a call is not called",
        before="            and list(map(_FORWARD, self._classes)) == self._forwards\n",
        after="",
        tests=_change("in all: Linear"),
    ),
    _state(
        "the op still runs after stock code was replaced",
        before="        or known.global_state != (shared or global_state(layer))\n",
        after="",
        tests=_change("in all: BertIntermediate"),
    ),
    _state(
        "the op keeps the former activation",
        before="self._activation_key() == self._activation\n",
        after="self._activation_key() != ()\n",
        tests=(f"{CHANGES}::test_gelus_form_is_read_again",),
    ),
    _state(
        "a layer that fell back for its activation falls back for good",
        before="else (self.global_state[0] or _reason(self._inside, self._layout)) == self.reason",
        after="else True",
        tests=(f"{CHANGES}::test_a_function_as_activation_is_read_again",),
    ),
    _state(
        "a transposed weight is read as if it were contiguous",
        before="if not tensor.is_contiguous():",
        after="if tensor.is_sparse:",
        tests=_change("unsupported: transposed"),
    ),
    _state(
        "an unaligned address is accepted",
        before="if any(address % ops.ALIGNMENT for address in addresses):",
        after="if not all(addresses):",
        tests=_change("unsupported: unaligned vector"),
    ),
    _state(
        "a Tensor subclass is treated as a plain tensor",
        before="if not all(tensor is not None and is_plain_tensor(tensor) for tensor in found):",
        after="if not all(tensor is not None for tensor in found):",
        tests=_change("onwards: subclass of Tensor"),
    ),
    _state(
        "attention's dropout uses the mode of its dropout module, not its own",
        before='scores["p"] if attention["training"] else 0.0,',
        after='scores["p"] if scores["training"] else 0.0,',
        tests=(f"{CHANGES}::test_one_dropout_by_itself[attention.self.dropout]",),
    ),
    _state(
        "both LayerNorms have the first one's eps",
        before='            second["eps"],\n',
        after='            first["eps"],\n',
        tests=_change("supported: second eps"),
    ),
    _state(
        "a hook that leads back to its model keeps it alive",
        before="known = vars(layer)[_ATTRIBUTE] = LayerState(layer)\n",
        after="known = vars(layer)[_ATTRIBUTE] = vars(state_of)[str(id(layer))] = LayerState(layer)\n",
        tests=(f"{CALLS}::test_what_leads_back_to_the_layer_keeps_no_model",),
    ),
    _state(
        "a scale that is a tensor reaches the kernel",
        before="if type(scale) is not float:",
        after="if scale is None:",
        tests=_change("unsupported: scaling by a tensor"),
    ),
    _layer(
        "a user's feed_forward_chunk is ignored",
        before='if own["chunk_size_feed_forward"] or known.chunk in own:',
        after='if own["chunk_size_feed_forward"]:',
        tests=_change("unsupported: own chunk"),
    ),
    _layer(
        "attention weights that the config requests are not recorded",
        before="(reason := mask.by_module or _keyword_reason(prepared.state, kwargs))",
        after="(reason := _keyword_reason(prepared.state, kwargs))",
        tests=(f"{CALLS}::test_outputs_requested_after_a_plain_call[config-output_attentions-eager]",),
    ),
    _layer(
        "a mask between queries and keys is ignored",
        before="        if mask.general is not None:\n",
        after="        if mask.general is not None and mask.keys is not None:\n",
        tests=(f"{MASKS_GIVEN}::test_any_form_does_what_stock_does",),
    ),
    _masks(
        "a column-major mask is read as row-major",
        before=", memory_format=torch.contiguous_format",
        after="",
        tests=(f"{MASKS_GIVEN}::test_any_form_does_what_stock_does",),
    ),
    _masks(
        "all layers use the same dropout seed",
        before="zip(self.layers, drawn.unbind(), strict=True)",
        after="zip(self.layers, [drawn[0]] * len(self.layers), strict=True)",
        tests=("tests/models/test_dropout.py::test_stock_under_the_same_masks_is_equal",),
    ),
    Fault(
        "a layer that occurs twice uses the same dropout twice",
        file="fastbert/layers/model.py",
        before="tuple(known) if len({*own}) == len(own) else ()",
        after="tuple(known)",
        tests=(f"{CALLS}::test_one_layer_may_stand_in_two_places",),
    ),
    Fault(
        "a layer's state outlives its patch",
        file="fastbert/patch.py",
        before="        layer_state.clear(module)\n",
        after="",
        tests=(f"{CALLS}::test_what_was_looked_at_is_forgotten_with_the_patch",),
    ),
    _verify(
        "verify compares layers module by module only and misses the op",
        before="coarse = _first_of(model, batch, patch_keywords, widened, inside=False)",
        after="coarse = _first_of(model, batch, patch_keywords, widened, inside=True)",
        tests=(f"{VERIFY}::test_wrong_forward_is_found_and_named",),
    ),
    _masks(
        "verify's own hooks send layers module by module",
        before='_IDLE = (*IDLE_HOOKS, SHARDING, "fastbert.verify")',
        after="_IDLE = (*IDLE_HOOKS, SHARDING)",
        tests=(f"{VERIFY}::test_wrong_forward_is_found_and_named",),
    ),
    Fault(
        "the title counts a layer whose modules have rows",
        file="fastbert/report.py",
        before="if row.kernel not in (None, _GRAPHS) and row.state != _BY_MODULE]",
        after="if row.kernel]",
        tests=("tests/models/test_report.py::test_a_layer_that_runs_module_by_module_has_a_row_for_each",),
    ),
)
