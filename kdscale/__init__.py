"""kdscale: distil a large language model, sharded elsewhere on the cluster, into a small one."""

__version__ = "0.1.0"
