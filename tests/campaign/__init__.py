"""Real engines under load, hit by one or two accidents drawn from a seed, again and again.

    python -m tests.campaign --minutes 60

`plan.py` draws, `world.py` is the pair and its operator, `accidents.py` what happens to it,
`cluster.py` the same with controllers and an etcd, `runs.py` the campaign.
"""
