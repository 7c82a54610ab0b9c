"""What of ours runs inside the server's own processes: standard library only, importable by any interpreter.

The supervisor puts this folder on the server's `PYTHONPATH`, so that an interpreter without managed_vllm (`python=`,
`command=`) finds the modules too; that is why they carry their long names at top level.
"""
