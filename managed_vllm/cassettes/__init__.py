"""Record and replay for tests: what a model server has answered, in a file, so that tests run without one.

`requests` says when two requests are the same, and how they differ; `cassette` is the file; `player` finds the recorded
response to a request; `server` is what clients talk to, in front of a model server or in its place.
"""
