"""Who says which response is better: people, on the pages of `rlhf feedback`; rules; and models that judge.

The pages are a web application of their own, which no stage imports: it reads files and writes files like any other
source of rankings. Collecting responses from a model is left out.
"""
