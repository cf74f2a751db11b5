"""Exhaustive models of what two nodes, a link and an arbiter can do to each other."""
