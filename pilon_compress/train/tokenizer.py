"""The tokenizer of a training: of the model that it starts from, named by the recipe, or trained on the text."""

import logging
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pilon_compress.data import text
from pilon_compress.data.corpus import source_of
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import damage
from pilon_compress.io.disk import atomic_folder
from pilon_compress.models import base_architectures, checkpoint
from pilon_compress.train.run import Run

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"


def open_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of the model to start from, of the recipe, or one trained on the text; kept in the output."""
    recipe, folder = run.recipe, run.output / "checkpoints" / TOKENIZER
    if recipe.start is not None:
        tokenizer = checkpoint.load_tokenizer(recipe.start)
        if recipe.data.chat_template is not None:
            tokenizer.chat_template = read_template(recipe.data.chat_template)
        return tokenizer
    if recipe.ffn.like is not None:
        return checkpoint.load_tokenizer(recipe.ffn.like)
    if recipe.host.tokenizer != "bpe":
        return checkpoint.load_tokenizer(recipe.host.tokenizer)
    if run.world.first:
        keep_tokenizer(run, folder)
    run.world.wait()
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return found


def keep_tokenizer(run: Run, folder: Path) -> None:
    """Train the tokenizer on the text and save it to `folder`, unless it is there, whole."""
    if folder.is_dir():
        reason = damage(folder)
        if reason is None:
            return
        log.warning("%s: the tokenizer is trained again", reason)
        shutil.rmtree(folder)
    documents = list(text.open_text(source_of(run.recipe), "calibration"))
    with atomic_folder(folder, manifest.write) as work:
        base_architectures.train_tokenizer(documents, run.recipe.host.vocab_size).save_pretrained(work)


def read_template(file: str) -> str:
    """A chat template. Raises BadInput where there is none."""
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the chat template {file} cannot be read: {error}") from None
