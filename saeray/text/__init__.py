"""From a dataset's name to token windows, each with an index. No Ray.

    dataset -> rows -> documents -> tokens

Uses `lm` for names and tokenizers, and `spec`.
"""
