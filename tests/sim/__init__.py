"""The deterministic simulator: the production core, two nodes, virtual time, one seed."""
