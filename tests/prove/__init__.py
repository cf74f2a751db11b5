"""Every promise checked by one command: `python -m tests.prove`, or `packaging/prove.sh`.

Each campaign is a module behind the interface of `campaign.py`; what it counts, it counts itself.
"""
