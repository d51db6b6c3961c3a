"""Several processes that train one dictionary: dp parts of the batch times tp shards."""

from fastsae.distributed.mesh import Mesh as Mesh
from fastsae.distributed.mesh import join_processes as join_processes
