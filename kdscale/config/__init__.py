"""A YAML file and dotted overrides in, one frozen, checked ``RunConfig`` out. Loads without torch."""

from kdscale.config.load import load_config
from kdscale.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]
