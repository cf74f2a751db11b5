"""What the two controllers decide, and the form of what they tell each other. Pure, like the core.

Must never import a module of the data path: a controller knows an engine by its state alone.
"""
