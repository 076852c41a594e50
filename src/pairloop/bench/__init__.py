"""Side-by-side benchmarks: pairloop and its peers in alternation on the same data, model and thread count.

Every contestant runs in a process of its own, so that memory is its own, and takes its turn when it is told to, so that what
disturbs the machine disturbs all. Peers are imported inside functions; where one is missing the extra is named.
"""
