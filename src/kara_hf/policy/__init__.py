"""What to keep: scores rank the tokens of a window, Token2Chunk makes chunks of a ranking. Owns no memory."""

from .kara import KaraPolicy
from .scores import SCORES, Window, register_score
from .token2chunk import token2chunk, top_tokens

__all__ = ["SCORES", "KaraPolicy", "Window", "register_score", "token2chunk", "top_tokens"]
