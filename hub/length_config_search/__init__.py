"""Search of length configurations as an OptunaHub package."""

from .sampler import LengthConfigSampler

__all__ = ["LengthConfigSampler"]
