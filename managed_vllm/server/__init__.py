"""One vLLM, from its start to its end. Only the supervisor imports it."""
