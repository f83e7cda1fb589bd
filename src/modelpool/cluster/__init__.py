"""A pool on Ray: the manager as a detached actor, a replica on every node that looks after the gateways there."""

NAMESPACE = "modelpool"
MANAGER = "manager"
APPLICATION = "modelpool"
GATEWAY = "gateway"
