"""The embedded default: a tiny support bot, the world it lives in, and the customers who pick between its answers.

`world` and `corpus` are the shop and its chats, `customers` are the people with a hidden taste, `verifier` is the
check a team would write without knowing that taste, `build` makes the model from nothing. Importing this package
imports nothing heavy.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The packaged model, in the plain Hugging Face layout."""

__all__ = ["MODEL_DIR"]
