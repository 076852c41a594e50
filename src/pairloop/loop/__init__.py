"""The loop: one file per stage, in the order in which data flows: serve, feedback, label, pairs, train, evaluate, gate, deploy.

Stages never import one another; ``cycle`` alone knows their order, and ``schedule`` when a cycle starts.
"""
