"""Real nodes with real controllers."""
