"""Engines behind HTTP: one or many vLLM-compatible servers, scored by this process's own forward pass.

``policy`` is what the house sees; ``fleet`` chooses and retries, ``keeper`` loads, watches and heals; ``replica`` speaks to one
server, in the bodies of ``wire``; ``assembly`` turns its chunks into completions; ``breaker`` keeps requests from a server that
fails them; ``probe`` finds out whether a server computes what it should.
"""

from pairloop.policy.remote.policy import RemotePolicy

__all__ = ["RemotePolicy"]
