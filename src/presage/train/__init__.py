"""The recipe of the bundled models: open text in, the same checkpoint out, everything in between written down (LLM360, 2312.06550).

``python -m presage.train --recipe tiny --data DIR --out DIR``
"""
