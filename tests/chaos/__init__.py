"""Chaos: real clients on a server whose processes are killed, stopped and made to misbehave at random moments.

`python tests/chaos/run.py --runs 500 --seed 0 --jobs 2` does it against the stand-in, `--real --runs 20` against the
real vLLM with the embedded model. A run follows from its seed alone: `plan` says what happens when, `run` lets it
happen, `client` is one client process, `sightings` looks at the processes from outside, `report` adds the runs up.
"""
