"""What `modelpool deploy` does, from Python: the manager actor and the gateways, on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import os

from modelpool.cluster.deploy import deploy
from modelpool.settings import load

if __name__ == "__main__":
    print(f"Model Pool serves at {deploy(load(os.environ))}/v1")
