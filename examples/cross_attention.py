"""A strategy in one file: cross-attention from decoder frames to tokens of the speaker embedding."""

from pydantic import Field
from torch import nn

from snac_core import Strategy, hookimpl


class CrossAttention(Strategy):
    """x + O attention(Q x, tokens of the speaker embedding), where O is 0 at initialisation.

    With a single token, the softmax is 1 and the edit is the same for all frames.
    """

    name = "cross_attention"
    after_taps = ("decoder_*",)

    class Config(Strategy.Config):
        tokens: int = Field(8, ge=2, description="Number of tokens made from the speaker embedding.")
        width: int = Field(64, ge=1, description="Channels of queries, keys and values.")

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.parts = nn.ModuleDict()
        for tap in taps.match(self.after_taps):
            part = self.parts[tap.name] = nn.ModuleDict()
            part["query"] = nn.Conv1d(tap.channels, config.width, 1)
            part["tokens"] = nn.Linear(taps.speaker_dim, config.tokens * 2 * config.width)  # keys and values
            part["out"] = nn.Conv1d(config.width, tap.channels, 1)
            nn.init.zeros_(part["out"].weight)
            nn.init.zeros_(part["out"].bias)

    @hookimpl
    def after_vq(self, x, cond, tap):
        part = self.parts[tap.name]
        tokens = part["tokens"](cond.speaker).unflatten(1, (self.config.tokens, -1))  # (B, tokens, 2 width)
        keys, values = tokens.chunk(2, dim=-1)
        queries = part["query"](x).transpose(1, 2)  # (B, F, width)
        heads = (each.unsqueeze(1) for each in (queries, keys, values))  # an export to ONNX needs this dimension
        attended = nn.functional.scaled_dot_product_attention(*heads).squeeze(1)  # (B, F, width)
        return x + part["out"](attended.transpose(1, 2))


@hookimpl
def register_strategies(register):
    register(CrossAttention)
