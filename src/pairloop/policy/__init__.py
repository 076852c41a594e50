"""Policies: what samples completions and what scores them.

``protocols`` says what the rest of the house may ask; ``local`` answers with transformers and PEFT, ``remote`` with
vLLM-compatible servers, ``fake`` without any model.
"""
