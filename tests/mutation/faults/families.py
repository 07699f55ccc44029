"""Faults of the families beside BERT: positions that skip padding, tasks, heads that read, projections, MLM heads, graphs."""

from functools import partial

from tests.mutation.fault import Fault

HEADS = "tests/models/test_families.py"
PACKING = "tests/models/test_families_packing.py"
CALLS = "tests/models/test_families_calls.py"
GRAPHS = "tests/graphs/test_families.py"

_embeddings = partial(Fault, file="fastbert/layers/embeddings.py")
_pooled = partial(Fault, file="fastbert/layers/pooled_heads.py")
_transform = partial(Fault, file="fastbert/layers/prediction_head.py")

FAULTS = (
    _embeddings(
        "the padding row of the positions gets a gradient",
        before="            self.position_embeddings.padding_idx,\n",
        after="            None,\n",
        tests=(f"{HEADS}::TestPositions::test_padding_inside_a_row",),
        short=True,
    ),
    _embeddings(
        "RoBERTa's positions count from the padding row of the table",
        before="self.create_position_ids_from_input_ids(ids, self.padding_idx, past)",
        after="self.create_position_ids_from_input_ids(ids, self.position_embeddings.padding_idx, past)",
        tests=(f"{HEADS}::TestPositions::test_another_padding_row_than_that_of_the_positions",),
    ),
    _embeddings(
        "RoBERTa's positions do not know the cache",
        before="self.create_position_ids_from_input_ids(ids, self.padding_idx, past)",
        after="self.create_position_ids_from_input_ids(ids, self.padding_idx, 0)",
        tests=(f"{CALLS}::TestDecoders::test_a_second_step_on_the_cache",),
    ),
    _embeddings(
        "RoBERTa's default types are read in the order of tokens",
        before="        return self._types_at(position_ids) if token_type_ids is None else token_type_ids, position_ids\n\n\n",
        after="        types = self.token_type_ids[:, : position_ids.shape[1]] if token_type_ids is None else token_type_ids\n"
        "        return types, position_ids\n\n\n",
        tests=(f"{HEADS}::TestPositions::test_types_from_the_buffer",),
    ),
    _embeddings(
        "ERNIE's row of the task is left out",
        before="return types + self.task_type_embeddings.weight[0] if self.use_task_id else types",
        after="return types",
        tests=(f"{HEADS}::TestErnie::test_the_first_task_by_default",),
    ),
    _embeddings(
        "tasks that are given are ignored",
        before='                reason = reason or "task_type_ids"\n',
        after="                pass\n",
        tests=(f"{HEADS}::TestErnie::test_tasks_that_are_given_are_stocks[base]",),
    ),
    _embeddings(
        "the padding row of the tasks gets a gradient",
        before="            elif self.task_type_embeddings.padding_idx is not None:\n",
        after="            elif False:\n",
        tests=(f"{HEADS}::TestErnie::test_a_padding_row_of_the_tasks",),
    ),
    Fault(
        "the embeddings of an ELECTRA that projects them are deferred",
        file="fastbert/layers/model.py",
        before='and not hasattr(self, "embeddings_project")',
        after="and True",
        tests=(f"{PACKING}::test_without_padding_the_last_layer_runs_at_the_first_rows_still[Electra]",),
        short=True,
    ),
    _pooled(
        "a classifier of a user's own is taken for RoBERTa's",
        before="part_of(type(module)).part == part and not hooked(module)",
        after="not hooked(module)",
        tests=(f"{PACKING}::test_a_users_own_classifier_keeps_the_batch_padded",),
    ),
    _pooled(
        "a hook on the classifier that PEFT's wrapper calls is not noticed",
        before="part_of(type(module)).part == part and not hooked(module) and ",
        after="part_of(type(module)).part == part and ",
        tests=(f"{PACKING}::test_pefts_wrapper_is_observed",),
    ),
    _pooled(
        "a hook on PEFT's wrapper is not noticed",
        before="if hooked(reader) or not all(",
        after="if not all(",
        tests=(f"{PACKING}::test_pefts_wrapper_is_observed",),
    ),
    _pooled(
        "a classifier that PEFT trains keeps the batch padded",
        before='if type(module).__name__ != "ModulesToSaveWrapper" or not type(module).__module__.startswith("peft."):',
        after="if True:",
        tests=(f"{PACKING}::test_peft_trains_the_classifier_beside_an_adapter",),
    ),
    _pooled(
        "a summary of all positions is taken for the first one",
        before=' and getattr(module, "summary_type", "first") == "first"',
        after="",
        tests=(f"{PACKING}::test_a_summary_of_other_positions_stays_padded",),
    ),
    _transform(
        "RoBERTa's LM head normalises with another eps",
        before="        eps=norm.eps,\n",
        after="        eps=1e-1,\n",
        tests=(f"{HEADS}::test_a_head_of_every_code_is_equal_in_float64",),
    ),
    _transform(
        "RoBERTa's LM head returns the rows before its decoder",
        before="        return self.decoder(self._run(features))\n",
        after="        return self._run(features)\n",
        tests=(f"{HEADS}::test_without_labels",),
    ),
    _transform(
        "a gelu that was put into RoBERTa's module is not called",
        before='return getattr(part.family.module, "gelu", None) if activation is None else',
        after="return nn.functional.gelu if activation is None else",
        tests=(f"{HEADS}::test_another_gelu_in_transformers_module",),
    ),
    Fault(
        "ELECTRA's discriminator runs another activation",
        file="fastbert/layers/intermediate.py",
        before="activation=kernel_activation(self.activation))",
        after='activation="relu")',
        tests=(f"{HEADS}::TestElectra::test_the_discriminators_loss_counts_tokens_only",),
    ),
    Fault(
        "a bucket has as many tokens as RoBERTa's table has rows",
        file="fastbert/layers/positions.py",
        before="return rows if padding is None else max(rows - padding - 1, 0)",
        after="return rows",
        tests=(f"{GRAPHS}::test_a_bucket_has_no_more_tokens_than_robertas_positions",),
    ),
    Fault(
        "a replay is given zeros for the model's own types",
        file="fastbert/graphs/inference.py",
        before="if request.types is None and (reason := types_reason(body_of(model))) is not None:",
        after="if request.types is None and (reason := None) is not None:",
        tests=(f"{GRAPHS}::test_types_of_the_models_own",),
    ),
    Fault(
        "RoBERTa's choices get no graph",
        file="fastbert/graphs/inference.py",
        before='type(model).__name__.endswith("ForMultipleChoice")',
        after='type(model).__name__ == "BertForMultipleChoice"',
        tests=(f"{GRAPHS}::test_warmup_of_choices",),
    ),
    Fault(
        "ELECTRA's projection gets the rate of a new head",
        file="fastbert/groups.py",
        before="(?:embeddings|embeddings_project|encoder|",
        after="(?:embeddings|encoder|",
        tests=(f"{CALLS}::TestGroups::test_a_new_head_and_rates_by_depth",),
    ),
)
