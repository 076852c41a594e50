"""The lab: small verifiable tasks, their base models, and the arms that are compared on them."""
