"""Where people rank responses and compare policies, for `rlhf feedback`.

A web application of its own: no stage imports it, and it reads files and writes files like any other source of
rankings. Collecting responses from a model is left out.
"""
