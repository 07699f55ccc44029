"""Makes texts of chosen lengths in tokens, and a tokenizer of whole words and endings that needs no download.

Every machine gets the same vocabulary and texts, so the same token counts.
"""

import random
from collections.abc import Sequence
from itertools import islice, product

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
WORDS = ["".join(pair) for pair in islice(product(SYLLABLES, SYLLABLES), 1900)]
ENDINGS = ("s", "ing", "er", "ly")  # each is a token of its own after a word
ENDED = 0.25  # share of the words with an ending
FEWEST = 3  # tokens of a text: a word between the two that mark its ends
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
VOCABULARY = len(BERT_SPECIAL) + len(WORDS) + len(ENDINGS)


def tokenizer(longest: int, roberta: bool = False) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens and segment ids, or with XLM-RoBERTa's special tokens and its order."""
    special = ROBERTA_SPECIAL if roberta else BERT_SPECIAL
    pad, unknown, first, last, mask = (special[i] for i in ((1, 3, 0, 2, 4) if roberta else (0, 1, 2, 3, 4)))
    vocabulary = {token: i for i, token in enumerate((*special, *WORDS, *(f"##{ending}" for ending in ENDINGS)))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(first, vocabulary[first]), (last, vocabulary[last])]
    made.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    names = ["input_ids", "attention_mask"] if roberta else ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=longest,
        model_input_names=names,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        mask_token=mask,
    )


def texts(lengths: Sequence[int], seed: int) -> list[str]:
    """One text for each length in tokens, both ends included.

    Raises:
        ValueError: a length below FEWEST.
    """
    if min(lengths, default=FEWEST) < FEWEST:
        raise ValueError(f"lengths: expected {FEWEST} tokens or more, got {min(lengths)}")
    chosen = random.Random(seed)
    return [_text(length - 2, chosen) for length in lengths]


def _text(tokens: int, chosen: random.Random) -> str:
    words = []
    while tokens > 0:
        ending = chosen.choice(ENDINGS) if tokens > 1 and chosen.random() < ENDED else ""
        words.append(chosen.choice(WORDS) + ending)
        tokens -= 2 if ending else 1
    return " ".join(words)
