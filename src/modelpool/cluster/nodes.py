"""A replica of the gateway on every node: Ray Serve has no such mode, so the number of replicas follows the nodes'.

No two replicas of it share a node. Once it has an external scaler, Ray Serve takes the number as it is told, and starts
none anew that runs.
"""

from __future__ import annotations

import logging

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from modelpool.cluster import APPLICATION, GATEWAY

log = logging.getLogger(__name__)

_DEADLINE_S = 10.0


def live_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def keep_a_replica_on_every_node() -> None:
    """Tell Ray Serve how many nodes there are, if it does not know. Nothing where there is no such deployment."""
    try:
        nodes = live_nodes()
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        deployment = DeploymentID(name=GATEWAY, app_name=APPLICATION)
        known = ray.get(controller.get_deployment_details.remote(APPLICATION, GATEWAY), timeout=_DEADLINE_S)
        if known is None or known.target_num_replicas == nodes:
            return
        ray.get(controller.update_deployment_replicas.remote(deployment, nodes), timeout=_DEADLINE_S)
    except (RayError, ValueError) as error:
        log.debug("the number of replicas stays: %s", error)
