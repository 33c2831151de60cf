"""Open files of the process that hosts a run's key-value store: rank 0, or torchrun's agent on the first node."""

FILES_OF_A_RANK = 100
"""Open files of a rank itself: 71 on CPU ranks (tools/bench_groups.py)."""
STORE_CONNECTIONS_PER_RANK = 2
"""Connections of a rank to the store: of the process group, and of its heartbeats."""
STORE_CONNECTIONS_PER_NODE = 4
"""Connections of a node with a relay (parallel/relay.py): its local rank 0's two, the relay's, torchrun's agent's."""
RELAY_CONNECTIONS_PER_RANK = 3
"""Connections of a rank to its node's relay: of the rendezvous, the process group and its heartbeats."""


def files_of_store_process(ranks: int) -> int:
    """Open files where every rank connects to the store."""
    return FILES_OF_A_RANK + STORE_CONNECTIONS_PER_RANK * ranks


def files_with_relays(ranks: int, ranks_per_node: int) -> int:
    """Open files where every node has a relay; rank 0 is one of them."""
    return (FILES_OF_A_RANK + STORE_CONNECTIONS_PER_NODE * -(-ranks // ranks_per_node)
            + RELAY_CONNECTIONS_PER_RANK * ranks_per_node)
