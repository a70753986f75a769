"""Several processes that train as one: rendezvous, coordination and supervision."""
