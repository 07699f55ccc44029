"""Texts longer than a model's positions: cut to their ends, or into overlapping windows whose outputs are pooled.

Sun et al. 2019 (How to Fine-Tune BERT for Text Classification?, https://arxiv.org/abs/1905.05583) compare keeping the head, the
tail, or both with mean and max pooling over parts; Dai and Callan 2019 (Deeper Text Understanding for IR with Contextual
Neural Language Modeling, https://arxiv.org/abs/1905.09217) rank documents by the first or the best of their passages.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.lengths import Counted, known_lengths

HOW = ("overlap", "head", "tail", "head+tail")
POOLINGS = ("mean", "max", "first", "token-mean")
HEAD_SHARE = 128 / 510  # of Sun et al.: 128 and 382 tokens around the cut, beside [CLS] and [SEP]
SIZE = 512  # tokens of a window, unless the tokenizer or the caller names another size
_UNLIMITED = 2**31  # a tokenizer that knows no limit has a larger number
_OUTPUTS = ("logits", "sentence_embedding", "scores")
_LABELS = ("labels", "label")

Output = str | Callable[[Any, dict[str, Tensor]], Tensor]


class Windows:
    """Cuts long texts into windows that a model can read, runs the model on them, and pools to one row per text.

        windows = fastbert.Windows(tokenizer, size=512, stride=128, pooling="mean")
        logits = windows.run(model, windows(texts).to(model.device))  # [texts, labels], with gradient

    In a pair of texts (a query and a document) the first stays whole and every window of the second has it in front.

    Args:
        tokenizer: a tokenizer of transformers, which adds its special tokens to each window. The truncation of a fast one
            makes the overlapping windows.
        size: the most tokens in a window, with special tokens; at most the positions of the model. By default the
            tokenizer's `model_max_length`, or 512 if it has none.
        how: "overlap": as many windows as it takes, each sharing `stride` tokens with the one before. One window: "head"
            (the first tokens), "tail" (the last), "head+tail" (`head` of the first and as many of the last as fit).
        stride: the tokens that neighbouring windows share, as in transformers' tokenizers; by default a quarter of `size`.
        head: the first tokens that "head+tail" keeps; by default 128 of 510, and that share of other sizes.
        pooling: of the windows of a text: "mean", "max" (equal maxima share the gradient), "first" (no others are made), or
            "token-mean", which weights each window by its tokens.
        max_windows: leave out a text's windows beyond so many; None for no limit.

    Raises:
        TypeError: `tokenizer` is not of transformers.
        ValueError: another argument is out of range; the message names it.
    """

    def __init__(
        self,
        tokenizer: Any,
        size: int | None = None,
        *,
        how: str = "overlap",
        stride: int | None = None,
        head: int | None = None,
        pooling: str = "mean",
        max_windows: int | None = None,
    ) -> None:
        if not hasattr(tokenizer, "is_fast"):
            raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
        for name, value, known in (("how", how, HOW), ("pooling", pooling, POOLINGS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if size is None:
            size = int(tokenizer.model_max_length) if tokenizer.model_max_length < _UNLIMITED else SIZE
        _check_integer("size", size, special + 1)
        stride = size // 4 if stride is None else stride
        _check_integer("stride", stride, 0)
        if how == "overlap" and stride >= size - special:
            raise ValueError(f"stride: expected fewer than the {size - special} tokens of a window, got {stride}")
        if max_windows is not None:
            _check_integer("max_windows", max_windows, 1)
        if head is not None:
            _check_integer("head", head, 1)
            if how != "head+tail" or head >= size - special:
                wanted = f"fewer than the {size - special} tokens of a window, and how='head+tail'"
                raise ValueError(f"head: expected {wanted}, got {head} and {how!r}")
        self.tokenizer: Any = tokenizer
        self.size: int = size
        self.how: str = how
        self.stride: int = stride
        self.head: int | None = head
        self.pooling: str = pooling
        self.max_windows: int | None = 1 if pooling == "first" else max_windows

    def __call__(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> Any:
        """The windows of all texts as one batch; see `collate` for its keys.

        Raises:
            TypeError, ValueError: as `split`.
        """
        columns = self.split(texts, text_pairs)
        return self.collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    def split(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> dict[str, list[list[list[int]]]]:
        """The windows of each text, as columns of a data set.

        With one of Hugging Face's: `dataset.map(lambda rows: windows.split(rows["text"]), batched=True)`.

        Args:
            texts: the texts; with `text_pairs` what stays whole in front of each window.
            text_pairs: the texts that are cut, one for each of `texts`.

        Returns:
            For each name of the tokenizer's model inputs, per text a list of windows, each a list of numbers. An empty text
            has one window, of special tokens.

        Raises:
            TypeError: a text by itself instead of a list of texts.
            ValueError: no texts; not as many pairs as texts; a first text that leaves no room for its second.
        """
        texts, text_pairs = _texts("texts", texts), None if text_pairs is None else _texts("text_pairs", text_pairs)
        if text_pairs is not None:
            if len(text_pairs) != len(texts):
                raise ValueError(f"text_pairs: expected {len(texts)}, one for each of texts, got {len(text_pairs)}")
            self._check_room(texts)
        if not self.tokenizer.is_fast:
            return self._in_python(texts, text_pairs)
        return self._overlapping(texts, text_pairs) if self.how == "overlap" else self._ends(texts, text_pairs)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """A batch of rows that `split` made: a collator for a DataLoader or Trainer.

        Returns:
            A BatchEncoding with the tokenizer's model inputs as int64 [W, S], W being the windows of all texts one text
            after the other and S the longest; "lengths", the tokens of each window; "windows", the windows of each text; and
            "labels", a tensor with a row per text, if the rows have "labels" or "label". What counts is known on the host.
        """
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        flat = {name: [window for row in rows for window in row[name]] for name in names}
        padded = self.tokenizer.pad(flat, padding=True, return_attention_mask=True, return_tensors="pt")
        labels = next((name for name in _LABELS if name in rows[0]), None)
        # Labels first: transformers takes the first tensor's rows for the size of the batch.
        made: dict[str, Any] = {} if labels is None else {"labels": torch.as_tensor([row[labels] for row in rows])}
        made |= {name: tensor for name, tensor in padded.items()}
        made["lengths"] = Counted(len(window) for window in flat[names[0]])
        made["windows"] = [len(row[names[0]]) for row in rows]
        return type(padded)(made)

    def run(
        self, model: nn.Module, batch: Mapping[str, Any], *, output: Output | None = None, token_budget: int | None = None
    ) -> Tensor:
        """Run `model` on every window and pool: [texts, ...], in the order of the texts, with gradient unless it is off.

        A patched model that packs gets the lengths, so that it need not wait for the device to count them.

        Args:
            model: a model of transformers, a SentenceTransformer or a CrossEncoder, stock or patched.
            batch: what this object made, on the model's device.
            output: what to pool: the name of one of the model's outputs, or a function of its outputs and inputs that
                returns a row per window. By default the logits, or the sentence embedding.
            token_budget: run in as few forwards as windows by falling length fit into so many tokens each, padding not
                counted. None: one forward of all windows. With gradient, what backward needs is kept for all of them.

        Raises:
            ValueError: `batch` is not from here; its windows have more tokens than the model has positions (`size`); a
                window has more than `token_budget`; the model has no such `output`.
        """
        # The mask, which collate makes, whether or not the tokenizer names it: the model must not see the padding.
        names = [name for name in dict.fromkeys([*self.tokenizer.model_input_names, "attention_mask"]) if name in batch]
        if not names or "windows" not in batch or "lengths" not in batch:
            raise ValueError(f"batch: expected one that Windows made, got {sorted(batch)}")
        inputs, lengths = {name: batch[name] for name in names}, list(batch["lengths"])
        _check_positions(model, max(lengths))
        forwards = [range(len(lengths))] if token_budget is None else _forwards(lengths, token_budget)
        if len(forwards) == 1:
            return self.pool(self._forward(model, inputs, lengths, output), batch)
        device = inputs[names[0]].device
        values = [
            self._forward(model, self._rows(inputs, rows, lengths, device), [lengths[row] for row in rows], output)
            for rows in forwards
        ]
        places = {row: place for place, row in enumerate(row for rows in forwards for row in rows)}
        order = _on_device([places[row] for row in range(len(lengths))], device)
        return self.pool(torch.cat(values).index_select(0, order), batch)

    def pool(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Pool a row per window to a row per text: [W, ...] to [texts, ...], of the same dtype and without synchronisation.

        Raises:
            ValueError: `values` has not one row per window of `batch`.
        """
        counts = list(batch["windows"])
        if not values.dim() or len(values) != sum(counts):
            raise ValueError(f"values: expected a row for each of {sum(counts)} windows, got shape {tuple(values.shape)}")
        if max(counts) == 1:
            return values
        parts = values.split(counts)
        if self.pooling == "first":
            return torch.stack([part[0] for part in parts])
        if self.pooling == "max":
            return torch.stack([part.amax(0) for part in parts])
        if self.pooling == "mean":
            return torch.stack([part.mean(0) for part in parts])
        # The sum as in mean, in float32 or better.
        sums_in = torch.promote_types(values.dtype, torch.float32)
        weights = _on_device(batch["lengths"], values.device, sums_in).view(-1, *[1] * (values.dim() - 1)).split(counts)
        pooled = [(part * own).sum(0) / own.sum(0) for part, own in zip(parts, weights, strict=True)]
        return torch.stack(pooled).to(values.dtype)

    def _check_room(self, firsts: list[str]) -> None:
        """Raise unless every first text leaves room for the second in a window; the tokenizer panics where there is none."""
        least = self.stride + 1 if self.how == "overlap" else 2 if self.how == "head+tail" else 1
        if self.how == "head+tail" and self.head is not None:
            least = self.head + 1
        distinct = list(dict.fromkeys(firsts))
        found = self.tokenizer(distinct, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        longest, text = max(zip(map(len, found), distinct, strict=True), key=lambda one: one[0])
        room = self.size - self.tokenizer.num_special_tokens_to_add(pair=True) - longest
        if room < least:
            raise ValueError(
                f"texts: expected first texts that leave {least} or more tokens of a window of {self.size} to the second, "
                f"got text {firsts.index(text)} of {longest} tokens, which leaves {max(room, 0)}"
            )

    def _overlapping(self, texts: list[str], pairs: list[str] | None) -> dict[str, list[list[list[int]]]]:
        encoded = self.tokenizer(
            texts,
            pairs,
            truncation="only_first" if pairs is None else "only_second",
            max_length=self.size,
            stride=self.stride,
            return_overflowing_tokens=True,
            verbose=False,
        )
        of_text: list[list[int]] = [[] for _ in texts]
        for window, text in enumerate(encoded["overflow_to_sample_mapping"]):
            of_text[text].append(window)
        if self.tokenizer.truncation_side == "left":  # it then begins with the last window
            of_text = [own[::-1] for own in of_text]
        names = [name for name in self.tokenizer.model_input_names if name in encoded]
        return {name: [[encoded[name][i] for i in own[: self.max_windows]] for own in of_text] for name in names}

    def _ends(self, texts: list[str], pairs: list[str] | None) -> dict[str, list[list[list[int]]]]:
        encoded = self.tokenizer(texts, pairs, truncation=False, verbose=False)
        part = 0 if pairs is None else 1
        places = [self._places(encoding.sequence_ids, part) for encoding in encoded.encodings]
        names = [name for name in self.tokenizer.model_input_names if name in encoded]
        return {name: [[[row[i] for i in own]] for row, own in zip(encoded[name], places, strict=True)] for name in names}

    def _places(self, sequences: list[int | None], part: int) -> list[int]:
        """The places of a whole sequence that stay: all but those of `part` for which there is no room."""
        own = [i for i, sequence in enumerate(sequences) if sequence == part]
        kept = {own[i] for i in self._kept(len(own), self.size - (len(sequences) - len(own)))}
        return [i for i, sequence in enumerate(sequences) if sequence != part or i in kept]

    def _kept(self, count: int, room: int) -> list[int]:
        """Which of `count` tokens stay where there is room for `room`: the first, the last, or both."""
        if count <= room:
            return list(range(count))
        head = {"head": room, "tail": 0, "head+tail": self.head or max(round(room * HEAD_SHARE), 1)}[self.how]
        return [*range(head), *range(count - (room - head), count)]

    def _in_python(self, texts: list[str], pairs: list[str] | None) -> dict[str, list[list[list[int]]]]:
        """As `_overlapping` and `_ends`, for a tokenizer in Python, which makes no windows and has no sequence ids."""
        plain = partial(self.tokenizer, add_special_tokens=False, truncation=False, verbose=False)
        firsts, cut = ([[]] * len(texts), texts) if pairs is None else (plain(texts)["input_ids"], pairs)
        special = self.tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        made = []
        for first, ids in zip(firsts, plain(cut)["input_ids"], strict=True):
            room = self.size - special - len(first)
            if self.how == "overlap":
                starts = range(0, max(len(ids) - self.stride, 1), room - self.stride)
                parts = [ids[start : start + room] for start in starts[: self.max_windows]]
            else:
                parts = [[ids[i] for i in self._kept(len(ids), room)]]
            sequences = [(part,) if pairs is None else (first, part) for part in parts]
            made.append([self.tokenizer.prepare_for_model(*own, truncation=False, verbose=False) for own in sequences])
        names = [name for name in self.tokenizer.model_input_names if name in made[0][0]]
        return {name: [[window[name] for window in windows] for windows in made] for name in names}

    def _rows(
        self, inputs: dict[str, Tensor], rows: Sequence[int], lengths: list[int], device: torch.device
    ) -> dict[str, Tensor]:
        """Some windows of the batch, without the padding that none of them needs."""
        index, longest = _on_device(rows, device), max(lengths[row] for row in rows)
        chosen = slice(None, longest) if self._pads_right else slice(-longest, None)
        return {name: tensor[:, chosen].index_select(0, index) for name, tensor in inputs.items()}

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], lengths: list[int], output: Output | None) -> Tensor:
        # With padding on the left a head that reads the first position keeps the padding, which lengths would deny.
        with known_lengths(model, lengths if self._pads_right else None):
            outputs = model(dict(inputs)) if isinstance(model, nn.Sequential) else model(**inputs)  # of sentence-transformers
        return _output_of(outputs, output, inputs, len(lengths))

    @property
    def _pads_right(self) -> bool:
        return self.tokenizer.padding_side == "right"


def _output_of(outputs: Any, output: Output | None, inputs: dict[str, Tensor], windows: int) -> Tensor:
    if callable(output):
        value = output(outputs, inputs)
    else:
        found = outputs if isinstance(outputs, Mapping) else {}
        value = next((found[name] for name in ((output,) if output else _OUTPUTS) if name in found), None)
        if value is None:
            wanted = repr(output) if output else " or ".join(_OUTPUTS)
            known = ", ".join(found) or type(outputs).__name__
            raise ValueError(f"output: expected {wanted} among the model's outputs, or a function of them, got {known}")
    if not isinstance(value, Tensor) or not value.dim() or len(value) != windows:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"output: expected a row for each of {windows} windows, got {got}")
    return value


def _forwards(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Windows by falling length, in groups of at most `token_budget` tokens: few groups, and little padding in each."""
    _check_integer("token_budget", token_budget, 1)
    if max(lengths) > token_budget:
        raise ValueError(f"token_budget: expected the longest window's {max(lengths)} tokens or more, got {token_budget}")
    groups: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if lengths[row] > room:
            groups.append([])
            room = token_budget
        groups[-1].append(row)
        room -= lengths[row]
    return groups


def _on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers on `device`; the copy is queued there, and nothing waits for it."""
    return torch.tensor(list(numbers), dtype=dtype).to(device, non_blocking=True)


def _check_positions(model: nn.Module, longest: int) -> None:
    most = next((found for name, module in model.named_modules() if (found := _positions(name, module))), None)
    if most is not None and longest > most:
        raise ValueError(f"size: the model has {most} positions, and the batch has windows of {longest} tokens")


def _positions(name: str, module: nn.Module) -> int | None:
    """The tokens that a table of positions is for. RoBERTa and its kin count from behind the padding index."""
    if name.rpartition(".")[2] != "position_embeddings" or not isinstance(module, nn.Embedding):
        return None
    return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")


def _texts(name: str, texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name}: expected a list of texts, got one text")
    found = list(texts)
    if not found:
        raise ValueError(f"{name}: expected at least one text")
    if not all(isinstance(text, str) for text in found):
        other = next(text for text in found if not isinstance(text, str))
        raise TypeError(f"{name}: expected texts, got a {type(other).__name__}")
    return found
