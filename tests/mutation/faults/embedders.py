"""Sentence-transformers' Pooling as the reader of an encoder, and token embeddings that are computed when they are read."""

from functools import partial

from tests.mutation.fault import Fault

MODES = "tests/embedders/test_pooling_modes.py"
TOKENS = "tests/embedders/test_token_embeddings.py"
PADDED = "tests/embedders/test_stays_padded.py"
PATCHING = "tests/embedders/test_patching.py"
TRAINING = "tests/embedders/test_training.py"

_plan = partial(Fault, file="fastbert/integrations/pooling_plan.py")
_fast = partial(Fault, file="fastbert/integrations/sentence_transformers.py")

FAULTS = (
    _plan(
        "a prompt that is left out is counted from the padding on",
        before="positions >= padding_before + left_out",
        after="positions >= left_out",
        tests=(f"{MODES}::test_masks",),
    ),
    _plan(
        "the last token is that of the prompt where nothing else is left",
        before='if mode == "lasttoken" and plan.counted is not None:',
        after="if False:",
        tests=(f"{MODES}::test_the_last_token_where_all_are_left_out",),
    ),
    _plan(
        "positions among packed rows are taken for those of the padded batch",
        before="return places if tokens.inverse is None else tokens.inverse.index_select(0, places)",
        after="return places.clamp(max=tokens.index.shape[0] - 1) if tokens.index is not None else places",
        tests=(f"{MODES}::test_rows_of_one_position_among_all",),
    ),
    _plan(
        "another mask than the encoder's is not noticed",
        before='features.get("attention_mask") is self.mask\n            and version_of(self.mask) == self.version\n',
        after="True\n",
        tests=(f"{PADDED}::test_what_changes_between_encoder_and_pooling",),
    ),
    _plan(
        "another mode than the encoder was told is not noticed",
        before="            and modes_of(pooling) == self.modes\n",
        after="",
        tests=(f"{PADDED}::test_what_changes_between_encoder_and_pooling",),
    ),
    _plan(
        "token weights are ignored",
        before='_OTHER_INPUTS = frozenset({"cu_seq_lens_q", "token_weights_sum", "cls_token_embeddings"})',
        after='_OTHER_INPUTS = frozenset({"cu_seq_lens_q"})',
        tests=(f"{PADDED}::test_features",),
    ),
    _fast(
        "a hook between encoder and pooling sees rows without values",
        before="if body is None or not model_packs_unseen(body) or",
        after="if body is None or",
        tests=(f"{PADDED}::test_hooks_between_encoder_and_pooling", f"{PADDED}::test_a_pooler_of_the_users_own"),
    ),
    _fast(
        "a prompt that PEFT adds before the model is overlooked",
        before='any(getattr(c, "is_prompt_learning", True) for c in configs.values())',
        after="False",
        tests=(f"{TRAINING}::test_prompt_tuning_stays_padded",),
    ),
    _fast(
        "one of two poolings decides for both",
        before="if len(seconds) == 1}",
        after="}",
        tests=(f"{PADDED}::test_two_poolings_behind_one_transformer",),
    ),
    _fast(
        "token embeddings that are read late lose their gradient",
        before="torch.set_grad_enabled(self._state.grad)",
        after="torch.no_grad()",
        tests=(f"{TOKENS}::test_reading_them_gives_stocks_with_gradients",),
    ),
    _fast(
        "token embeddings are computed with parameters of later",
        before="if not (unchanged and self._state.is_current(self._transformer)):",
        after="if not unchanged:",
        tests=(f"{TOKENS}::test_what_cannot_be_computed_any_more_is_refused",),
    ),
    _fast(
        "token embeddings are computed with parameters that a fused optimizer has written",
        before="register_optimizer_step_post_hook(_after_step)\n",
        after="",
        tests=(f"{TOKENS}::test_a_step_of_an_optimizer_is_noticed",),
    ),
    _fast(
        "token embeddings that are read have another dropout than the sentence",
        before="        if plan.alone:\n            return tokens\n",
        after="        return tokens\n",
        tests=(f"{TOKENS}::test_the_tokens_have_the_dropout_of_the_sentence",),
    ),
    _fast(
        "a forward runs twice each time that token embeddings are read",
        before="        self._link.padded = _READ\n",
        after="",
        tests=(f"{TOKENS}::test_afterwards_the_model_stays_padded_until_it_is_patched_again",),
    ),
    _fast(
        "a saved model names the modules of fastbert",
        before='found |= {"__module__": cls.__module__, "__qualname__"',
        after='found |= {"__module__": __name__, "__qualname__"',
        tests=(f"{PATCHING}::test_a_saved_folder_is_stocks",),
    ),
    Fault(
        "a gradient of token embeddings that nobody computed gets lost",
        file="fastbert/integrations/lazy_tokens.py",
        before="lazy.register_hook(_refuse_gradient)",
        after="pass",
        tests=(f"{TOKENS}::test_a_gradient_never_gets_lost",),
    ),
    Fault(
        "a copy of token embeddings shows what is written to them later",
        file="fastbert/integrations/lazy_tokens.py",
        before="                source.value()\n",
        after="                pass\n",
        tests=(f"{TOKENS}::test_a_copy_keeps_what_it_was_made_of",),
    ),
    Fault(
        "an output without a gradient stops DistributedDataParallel",
        file="fastbert/integrations/lazy_tokens.py",
        before="    if gradient is not None:",
        after="    if True:",
        tests=(f"{TRAINING}::test_distributed_data_parallel",),
    ),
    Fault(
        "a pooling beside others reads a padded first position",
        file="fastbert/layers/packing_plan.py",
        before="watched = alone or (reading is not None and reading.positions is not None and reading.hides_padding)",
        after="watched = alone",
        tests=(f"{MODES}::test_left_padding_and_the_first_position",),
    ),
    Fault(
        "a causal encoder gives a pooling all rows for the one that it reads",
        file="fastbert/layers/encoder.py",
        before="packing.read is not None and not pooled and causal",
        after="packing.read is not None and causal",
        tests=(f"{MODES}::test_a_causal_encoder",),
    ),
    Fault(
        "a SentenceTransformer without a supported model is accepted",
        file="fastbert/patch.py",
        before="found = found or entry.own_code is None",
        after="found = True",
        tests=(f"{TRAINING}::test_a_model_of_stock_pooling_alone",),
    ),
)
