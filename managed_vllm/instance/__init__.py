"""What users and supervisor share: the state directory, the channel, attaching, spawning, and external servers."""
