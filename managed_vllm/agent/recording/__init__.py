"""Third-party agents on record: an OpenAI-compatible URL per episode, whose turns become a trajectory.

`gateway` is the HTTP server that agents talk to, `episodes` one episode from its URL to its trajectory, `turns` what
the model server is asked beyond what the agent asks, what the agent sees of it, and what the record has of both.
"""
