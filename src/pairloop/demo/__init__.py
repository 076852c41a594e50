"""The demo: a real server on loopback, the starter's customers, round after round, and a report."""
