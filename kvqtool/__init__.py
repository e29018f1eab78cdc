"""kvqtool: compress the KV cache of Hugging Face language models, measure what it costs, plan what
it buys.
"""

__version__ = "0.1.0"
