"""The offline judge of content: a small phone recogniser of this project, its training, and what it is good for.

It judges and never teaches. It lives in the runner, which no plugin may import, and gives names of phones, which carry
no gradient.
"""
