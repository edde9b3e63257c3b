"""Packing for language models: documents in, rows of equally many tokens out, inside Ray Data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ray_trainer.errors import ConfigError, DataError
from ray_trainer.losses import IGNORE_LABEL

if TYPE_CHECKING:
    import ray.data

Tokens: TypeAlias = npt.NDArray[np.int32]
Encode: TypeAlias = Callable[[list[Any]], Sequence[Sequence[int]]]

PADDING = -1  # in place of a document's number


def pack_documents(
    dataset: "ray.data.Dataset",
    tokenizer: Any,
    length: int,
    *,
    end_of_document: int | None = None,
    column: str = "text",
    documents_per_group: int = 1000,
) -> "ray.data.Dataset":
    """Tokenize documents, put them one after the other and cut rows of equal length, as a step of Ray Data.

    The rows are a function of the documents and their order alone, not of blocks, files or CPUs. To that end
    documents are packed in groups of a fixed number; within a group nothing is dropped or repeated. Each row
    begins with the token that ended the row before, so each token but the first of a document is predicted
    exactly once. The last row of a group is filled up with padding: up to ``length`` tokens a group, so choose
    groups that hold many rows. A group is in the memory of one task at a time; more than that is never held.

    The columns of the result are int32 of shape ``(length,)``:

    - ``input_ids``: tokens; padding is ``end_of_document``.
    - ``labels``: the same, but -100, which no loss counts, for padding and for the first token of a row or a
      document: there is nothing it could be predicted from. They are not shifted; language modelling does that.
    - ``document_ids``: which document of the row, from 0; padding -1. A model that attends only where they are
      equal does not see across documents.
    - ``position_ids``: place within the document, from 0 at the start of a row or a document. Models of
      ``transformers`` keep documents apart by these alone if their config has ``use_cache=False``.

    A model is given those that its forward names; ``drop_columns`` saves the memory of the others.

    Args:
        dataset: a document a row; it keeps its order from now on (``preserve_order``).
        tokenizer: from ``transformers`` or ``tokenizers``, used without its special tokens; or a function from
            one document to its tokens, such as ``list`` for the bytes of a ``bytes`` column.
        length: tokens a row, at least 2.
        end_of_document: put after each document. None: the ``eos_token_id`` of the tokenizer.
        column: holds the documents; the other columns are left out.
        documents_per_group: another number is another packing.

    Raises:
        ConfigError: an argument cannot be used. The dataset is not touched.
    """
    end = getattr(tokenizer, "eos_token_id", None) if end_of_document is None else end_of_document
    _require_usable(tokenizer, length, end, documents_per_group)
    assert end is not None
    packer = _Packer(_encoder(tokenizer), length, end, column)
    dataset.context.execution_options.preserve_order = True  # else groups would hold what is ready first
    groups = dataset.select_columns([column]).repartition(target_num_rows_per_block=documents_per_group, strict=True)
    return groups.map_batches(packer.pack, batch_size=None)


@dataclass(frozen=True)
class _Packer:
    encode: Encode
    length: int
    end_of_document: int
    column: str

    def pack(self, group: dict[str, Any]) -> dict[str, Tokens]:
        """The rows of a group of documents."""
        documents = list(group[self.column])
        _refuse_missing(documents, self.column)
        return packed([_as_tokens(ids) for ids in self.encode(documents)], self.length, self.end_of_document)


def packed(documents: Sequence[Tokens], length: int, end_of_document: int) -> dict[str, Tokens]:
    """The columns of `pack_documents` for one group.

    Args:
        documents: the tokens of each, without the one that ends it.
        length: tokens a row.
        end_of_document: put after each document, and used as padding.
    """
    end = np.array([end_of_document], dtype=np.int32)
    tokens = np.concatenate([end[:0], *(part for document in documents for part in (document, end))])
    sizes = np.array([len(document) + 1 for document in documents], dtype=np.int64)
    document_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    place_in_document = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    stride = length - 1  # the last token of a row is the first of the next
    starts = np.arange(0, len(tokens) - 1, stride)[:, None]
    places = starts + np.arange(length)
    is_padding = places >= len(tokens)
    places[is_padding] = len(tokens) - 1

    input_ids = np.where(is_padding, end, tokens[places])
    position_ids = np.where(is_padding, 0, np.minimum(place_in_document[places], np.arange(length)))
    document_ids = document_of[places] - document_of[starts]
    return {
        "input_ids": input_ids,
        "labels": np.where(position_ids == 0, np.int32(IGNORE_LABEL), input_ids),
        "document_ids": np.where(is_padding, np.int32(PADDING), document_ids),
        "position_ids": position_ids.astype(np.int32),
    }


def _encoder(tokenizer: Any) -> Encode:
    """One way to call them all."""
    if hasattr(tokenizer, "encode_batch"):  # of `tokenizers`
        return lambda texts: [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # of `transformers`; verbose would warn of long documents
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return lambda texts: [tokenizer(text) for text in texts]


def _as_tokens(ids: Sequence[int]) -> Tokens:
    tokens = np.asarray(ids)
    if not tokens.size:
        return np.empty(0, np.int32)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**31:
        raise DataError(
            f"The tokenizer returned {ids!r:.80} for a document. It must return one list of whole numbers from 0 on."
        )
    return tokens.astype(np.int32)


def _refuse_missing(documents: list[Any], column: str) -> None:
    for place, document in enumerate(documents):
        if document is None or document != document:  # a missing value may have become NaN
            before = f"the one after {documents[place - 1]!r:.60}" if place else "the first of its group"
            raise DataError(
                f"A document is missing: column {column!r} holds {document!r} in {before}. Fill it or filter it out."
            )


def _require_usable(tokenizer: Any, length: int, end: int | None, documents_per_group: int) -> None:
    errors = []
    if not callable(tokenizer) and not hasattr(tokenizer, "encode_batch"):
        errors.append(f"tokenizer is {tokenizer!r}. Give a tokenizer, or a function from a document to its tokens.")
    if length < 2:
        errors.append(f"length is {length}. A row needs at least 2 tokens: one to predict, and one to predict it from.")
    if end is None:
        errors.append("end_of_document is missing, and the tokenizer has no eos_token_id. Name the token to put there.")
    elif not 0 <= end < 2**31:
        errors.append(f"end_of_document is {end}. A token is a whole number from 0 on.")
    if documents_per_group < 1:
        errors.append(f"documents_per_group is {documents_per_group}. It must be at least 1.")
    if errors:
        raise ConfigError("\n".join(errors))
