"""Who reaches a Ray cluster can run anything on it, unless it asks for a token: one that others can reach must."""

import os
from pathlib import Path

import grpc
import ray

from kdscale import log
from kdscale.errors import PlacementError
from kdscale.tunnel import is_loopback

_LOG = log.get(__name__)
_KNOCK_S = 10.0
_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def require_locked() -> None:
    """Of the cluster that this process has joined.

    Raises: PlacementError when a node of it listens off loopback, and its head answers who shows no token.
    """
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    reachable = sorted(address for address in nodes if not is_loopback(address))
    if not reachable:
        return
    head = ray.get_runtime_context().gcs_address
    if not _asks_for_token(head):
        raise PlacementError(
            f"the Ray cluster of {head} listens at {', '.join(reachable[:3])} and takes orders without a token, from anybody;"
            " start it with RAY_AUTH_MODE=token (launch/ray_head.sh and launch/ray_worker.sh do), or on 127.0.0.1 alone"
        )
    if len(reachable) > 1 and os.environ.get("RAY_USE_TLS", "0") != "1":
        _LOG.warning(
            "Ray between %s is guarded by its token and not encrypted (RAY_USE_TLS is not 1): that network must be private",
            ", ".join(reachable[:3]),
        )


def _asks_for_token(head: str) -> bool:
    """Whether the head turns away a question without a token. Raises: PlacementError when it gives no answer at all."""
    with _channel(head) as channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=_KNOCK_S, wait_for_ready=True)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            if code == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise PlacementError(
                f"whether the Ray cluster of {head} asks for a token could not be found out: {code.name}"
            ) from error
    return False


def _channel(head: str) -> grpc.Channel:
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        return grpc.insecure_channel(head)
    authority, key, certificate = (
        Path(os.environ[f"RAY_TLS_{name}"]).read_bytes() for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT")
    )
    return grpc.secure_channel(head, grpc.ssl_channel_credentials(authority, key, certificate))
