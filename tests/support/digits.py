"""A tokenizer one can check by eye, and token windows of small files made with it."""

import pyarrow as pa
import pyarrow.parquet

from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.text.tokens import TokenWindows


class Digits:
    """A digit is its own id, BOS is 0; what is no digit is left out."""

    bos_token_id = 0
    eos_token_id = None

    def __len__(self):
        return 10

    def convert_ids_to_tokens(self, token_id):
        return f"<{token_id}>"

    def convert_tokens_to_ids(self, token):
        return int(token[1]) if len(token) == 3 and token[1].isdigit() else None

    def __call__(self, texts, **_):
        return {"input_ids": [[int(c) for c in text if c.isdigit()] for text in texts]}


def config_of(path, **changes):
    """Of windows of four tokens, one of them held out."""
    values = dict(
        model_name="digits",
        hook_point="blocks.0.hook_resid_pre",
        dataset_path=str(path),
        context_size=4,
        eval_windows=1,
        seed=0,
    )
    return resolve(LanguageModelSAERunnerConfig(**(values | changes)))


def windows_of(path, tokenizer=None, warn=lambda text: None, n_embeddings=None, **changes):
    config = config_of(path, **changes)
    return TokenWindows(config, tokenizer or Digits(), n_embeddings=n_embeddings, warn=warn)


def parquet(path, **columns):
    pa.parquet.write_table(pa.table(columns), path)
    return path
