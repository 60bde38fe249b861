"""fedlora.v1: the services between server, clients and workers, and their generated code."""
