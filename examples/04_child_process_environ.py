"""Hand a server to a child process by environment variables.

- A Python program that uses this library: `llm.environ()` makes a bare `ManagedVLLM()` attach to this very server, with
  a lease of its own.
- Any other program with an OpenAI client: give it URL, key and model. It has no lease: the server lives as long as the
  parent holds its own.

    python examples/04_child_process_environ.py
"""

import os
import subprocess
import sys

from managed_vllm import ManagedVLLM

OURS = """
from managed_vllm import ManagedVLLM
with ManagedVLLM() as llm:
    print("child:", llm.model, llm.chat([{"role": "user", "content": "Hello"}], {"max_tokens": 16})[0].outputs[0].text)
"""

ANY = """
import os, openai
client = openai.OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
answer = client.completions.create(model=os.environ["MODEL"], prompt="Hello", max_tokens=16)
print("any client:", answer.choices[0].text)
"""

with ManagedVLLM(model="demo") as llm:
    subprocess.run([sys.executable, "-c", OURS], env={**os.environ, **llm.environ()}, check=True)

    openai_variables = {"OPENAI_BASE_URL": llm.base_url, "OPENAI_API_KEY": llm.api_key or "none", "MODEL": llm.model}
    subprocess.run([sys.executable, "-c", ANY], env={**os.environ, **openai_variables}, check=True)
