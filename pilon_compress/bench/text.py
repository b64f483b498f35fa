"""Text that models read in a benchmark, where their time depends on it."""

import torch

from pilon_compress.data import sequences, text
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint

TEXT = "stdlib"  # source of text that is on every machine


def text_ids(model: str, count: int) -> torch.Tensor:
    """Return ids (count,) of English text, by the model's tokenizer. Raises BadInput where there is not so much."""
    documents = list(text.open_text(TEXT))
    ids, _ = sequences.stream(checkpoint.load_tokenizer(model), documents, count)
    if len(ids) < count:
        raise BadInput(f"the text of a timing has {len(ids)} tokens: lower --batch or --context")
    return torch.tensor(ids[:count])
