"""Every mode of Pooling on packed rows: equal embeddings and gradients, the rows in the products, prompts, masks and dtypes."""

import copy
import functools

import pytest
import torch

import fastbert
from fastbert.testing.models import counting, rows_in_products
from tests.embedders.tiny import (
    MODES,
    TEXTS,
    TOKENS,
    WIDTH,
    assert_packs,
    assert_padded,
    check,
    close,
    embed,
    features_of,
    make,
    row_of,
    save,
)

pytestmark = pytest.mark.one_in(2)

REDUCED = ("mean", "mean_sqrt_len_tokens", "weightedmean", "max")
AT_A_POSITION = ("cls", "lasttoken")
SEVERAL = [("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), ("mean", "cls"), ("lasttoken", "max")]


@pytest.mark.parametrize("mode", [*MODES, *SEVERAL], ids=str)
def test_embeddings_and_gradients(folder, mode):
    model = make(folder, mode).train()
    features = features_of(model)
    assert features["attention_mask"].sum(1).tolist() == TOKENS
    patched = check(model, features)
    assert_packs(patched)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", [*MODES, SEVERAL[0]], ids=str)
def test_half_precision(folder, mode):
    model = make(folder, mode).half()
    assert_packs(check(model, features_of(model), backward=False))


def test_rows_of_one_position_among_all(folder):
    stock, model = (make(folder, ("cls", "lasttoken", "mean")) for _ in range(2))
    result, expected = (embed(m, features_of(m), False)["output"] for m in (fastbert.patch(model), stock))
    close(result, expected)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", ("mean", "cls")], ids=str)
def test_rows_that_enter_each_product_are_the_tokens(folder, mode):
    model = fastbert.patch(make(folder, mode))
    tokens, texts = sum(TOKENS), len(TEXTS)
    rows = rows_in_products(lambda: model(features_of(model)))
    first = [tokens] * 4  # q, k and v in one, attention's output, and the two of the feed-forward
    last = [texts, tokens] + [texts] * 3 if mode in AT_A_POSITION else first  # read positions, keys and values of all
    assert rows == [*first, *last, texts]  # and stock's pooler, whose result nothing reads
    assert tokens < texts * max(TOKENS)


@pytest.mark.parametrize("mode", REDUCED)
def test_one_kernel_pools(folder, mode):
    model = fastbert.patch(make(folder, mode))
    with torch.no_grad(), counting(heads=True) as launched:
        model(features_of(model))
    assert launched["pool_rows_fwd_kernel"] == 1
    assert "gather_rows_kernel" not in launched, "nothing is unpacked"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", [*MODES, SEVERAL[0]], ids=str)
@pytest.mark.parametrize("length", [1, 3, 5])
def test_prompts_that_are_left_out(folder, mode, length):
    """Of 3 tokens, a prompt of 3 leaves none."""
    model = make(folder, mode, include_prompt=False)
    features = features_of(model) | {"prompt_length": length}
    patched = fastbert.patch(copy.deepcopy(model))
    expected = embed(model, features, backward=False)["output"]
    result = embed(patched, features, backward=False)["output"]
    close(result, expected)
    assert_packs(patched)
    if mode in MODES:
        assert not torch.allclose(expected, embed(model, features_of(model), False)["output"]) or mode == "lasttoken"


@pytest.mark.parametrize("given", [2, torch.tensor([2]), torch.tensor([2, 2, 2])], ids=["int", "one", "per row"])
def test_gradients_with_a_prompt_left_out(folder, given):
    model = make(folder, SEVERAL[0], include_prompt=False)
    assert_packs(check(model, features_of(model) | {"prompt_length": given}))


def test_the_last_token_where_all_are_left_out(folder):
    model = make(folder, "lasttoken", include_prompt=False)
    patched = check(model, features_of(model) | {"prompt_length": 4}, backward=False)
    assert_packs(patched)
    result = embed(patched, features_of(model) | {"prompt_length": 4}, backward=False)["output"]
    assert not result[1].any() and result[[0, 2]].all(), "the second text has 3 tokens"


def test_a_prompt_that_is_pooled(folder):
    model = make(folder)
    assert_packs(check(model, features_of(model) | {"prompt_length": 2}))


def masked(model, change):
    features = features_of(model)
    change(features["attention_mask"])
    return features


def left(mask):
    mask.copy_(mask.flip(1))


def holes(mask):
    mask[:, 1] = 0


def empty(mask):
    mask[1] = 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", [*REDUCED, "lasttoken", ("mean", "lasttoken")], ids=str)
@pytest.mark.parametrize("length", [None, 2])
@pytest.mark.parametrize("change", [left, holes])
def test_masks(folder, mode, change, length):
    model = make(folder, mode, include_prompt=length is None)
    features = masked(model, change) | {"prompt_length": length or 1}
    assert_packs(check(model, features, backward=False))


@pytest.mark.parametrize("mode", ["cls", ("mean", "cls")], ids=str)
def test_left_padding_and_the_first_position(folder, mode):
    """Stock reads the first token; a packing encoder reads position 0."""
    model = make(folder, mode)
    assert_padded(check(model, masked(model, left)), "a padded position is read")


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean"])
def test_a_text_of_padding_alone(folder, mode):
    model = make(folder, mode)
    patched = check(model, masked(model, empty))
    assert_packs(patched)
    assert not embed(patched, masked(model, empty), False)["output"][1].any()


def test_the_largest_of_no_token(folder):
    model = make(folder, "max")
    result = embed(fastbert.patch(model), masked(model, empty), False)["output"]
    assert (result[1] == float("-inf")).all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("mode", ["cls", "lasttoken", ("mean", "lasttoken")], ids=str)
def test_a_position_of_a_text_of_padding_alone(folder, mode):
    model = make(folder, mode)
    model[0].model.set_attn_implementation("eager")  # SDPA gives zeros where there is no key
    assert_padded(check(model, masked(model, empty), backward=False), "a padded position is read")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", [*MODES, SEVERAL[0]], ids=str)
def test_without_padding(folder, mode):
    """Nothing is to pack, but the rows are pooled by the kernel, and one position is read by the last layer."""
    model = make(folder, mode)
    patched = check(model, features_of(model, TEXTS[:1]), backward=mode in ("mean", "cls"))
    row, encoder = row_of(patched), row_of(patched, "BertEncoder")
    assert (row.kernel_calls, row.fallback_calls) == (1, {})
    assert encoder.fallback_calls == ({} if mode in AT_A_POSITION else {"a batch without padding": 1})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8], ids=str)
def test_types_of_masks(folder, dtype):
    model = make(folder, ("weightedmean", "lasttoken"), include_prompt=False)
    features = features_of(model) | {"prompt_length": 2}
    features["attention_mask"] = features["attention_mask"].to(dtype)
    if dtype == torch.bool:
        expected = embed(model, features | {"attention_mask": features["attention_mask"].long()}, False)["output"]
        close(embed(fastbert.patch(model), features, False)["output"], expected)
    else:
        assert_packs(check(model, features, backward=False))


def test_settings_are_read_at_each_call(folder):
    model, stock = fastbert.patch(make(folder)), make(folder)
    for mode in ("mean", "cls", ("max", "mean")):
        model[1].pooling_mode = stock[1].pooling_mode = mode
        result, expected = (embed(m, features_of(m), False)["output"] for m in (model, stock))
        close(result, expected)
    assert_packs(model, calls=3)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", ("cls", "mean")], ids=str)
def test_token_budgets(folder, mode):
    """One shape for every batch, and no synchronisation."""
    model = make(folder, mode)
    expected = embed(model, features_of(model), False)["output"]
    fastbert.patch(model)
    for counts in ({"token_budget": 22}, {"lengths": TOKENS}):
        with fastbert.lengths(model, **counts):
            close(embed(model, features_of(model), False)["output"], expected)
    assert_packs(model, calls=2)
    assert expected.shape[1] % WIDTH == 0


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "mean"])
def test_a_causal_encoder(tmp_path, mode):
    """It takes the rows of its last layer after attention, however many they are."""
    model = make(save(tmp_path, is_decoder=True, use_cache=False), mode)
    assert_packs(check(model, features_of(model)))
    features = features_of(model, TEXTS + TEXTS)
    features["attention_mask"][0, 2:] = features["attention_mask"][1:, 1:] = 0  # of 7 tokens 6 are read
    assert_packs(check(model, features, backward=False))


@pytest.fixture(scope="session")
def of_family(tmp_path_factory):
    """The folder of a tiny model of a family."""
    return functools.cache(lambda family: save(tmp_path_factory.mktemp(family), family))


FAMILIES = ["xlm-roberta", "roberta", "camembert", "electra", "distilbert"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["mean", "cls", ("lasttoken", "mean")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(of_family, family, mode):
    model = make(of_family(family), mode).train()
    encoder = {"xlm-roberta": "XLMRobertaEncoder", "distilbert": "Transformer"}.get(family, f"{family.capitalize()}Encoder")
    assert_packs(check(model, features_of(model), family in ("xlm-roberta", "distilbert")), encoder=encoder)
