"""A language model of two matrices, without Transformers."""

from types import SimpleNamespace

import torch


class LinearModel:
    """Logits that are activations [.., d_in] times a matrix: `LanguageModel` to others."""

    def __init__(self, hook, d_vocab, d_in):
        generator = torch.Generator().manual_seed(0)
        self.hook = hook
        self.facts = SimpleNamespace(d_vocab=d_vocab)
        self.embed = torch.randn(d_vocab, d_in, generator=generator)
        self.unembed = torch.randn(d_in, d_vocab, generator=generator)

    def activations(self, tokens):
        x = self.embed[tokens.long()]
        return {self.hook: x.reshape(-1, x.shape[-1])}

    def logits(self, tokens, splice=None):
        x = self.embed[tokens.long()]
        return (splice[self.hook](x) if splice else x) @ self.unembed
