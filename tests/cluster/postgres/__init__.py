"""PostgreSQL on the mirror, through repeated failovers."""
