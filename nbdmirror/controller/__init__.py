"""The controller: watches, decides, and acts for one mirror on one node.

Owns roles, heartbeats, checkers, the application and everything that is started for it. Must never
import the engine: it speaks to it over the control socket.
"""
