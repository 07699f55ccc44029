"""For the tests of `python -m bench train`: small files of real text, a tiny BERT with a tokenizer of these, and the call."""

from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bench.__main__ import app

DATA = Path(__file__).parents[2] / "data/train"
FILES = {
    "classification": DATA / "classification.tsv",
    "matching": DATA / "matching.tsv",
    "ner": DATA / "ner.tsv",
    "qa": DATA / "qa.json",
    "multiple-choice": DATA / "multiple-choice.csv",
    "mlm": DATA / "text.txt",
    "pretraining": DATA / "text.txt",
    "clm": DATA / "text.txt",
}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of the test files: common words whole, others in letters. Trained ones differ from process to process."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str("\n".join(path.read_text() for path in sorted(DATA.iterdir())))
    words = Counter(word for word, _ in splitter.pre_tokenize_str(text))
    letters = sorted({letter for word in words for letter in word})
    common = sorted(words.keys() - set(letters), key=lambda word: (-words[word], word))[:150]
    vocabulary = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), *common]
    pieces = models.WordPiece({piece: number for number, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def save_model(folder: Path, config_class: type = BertConfig, sizes: dict[str, Any] | None = None) -> Path:
    """A model of one layer, 16 wide, that was never trained."""
    tokenizer = make_tokenizer()
    shared = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, "pad_token_id": tokenizer.pad_token_id}
    config = config_class(**shared, **SIZES if sizes is None else sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, content: str | bytes, name: str = "file.tsv") -> Path:
    """A file of the content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def invoke(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `python -m bench train …` in this process."""
    done = CliRunner().invoke(app, ["train", *(str(argument) for argument in arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output
